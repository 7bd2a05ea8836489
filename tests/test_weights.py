"Weights of other architectures, from modules and from files, and models from a hub."

import subprocess
import sys

import pytest
import torch
from hub_server import running

from crosscoder import compare_weights
from crosscoder.changes.weights import moved_tokens, plot_weights, weight_lines

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
MORE = {
    "gpt2": {},
    "gpt_neox": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 3},
}


def make(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **MORE[kind])).eval()


@pytest.mark.parametrize("kind", MORE)
def test_modules_and_files_say_the_same(kind, tmp_path):
    "A change in two matrices of block 1 is found there and nowhere else, whatever the names are."
    from crosscoder.data.models import find_blocks

    a, b = make(kind), make(kind)
    changed = [p for p in find_blocks(a)[1].parameters() if p.ndim > 1][-2:]
    with torch.no_grad():
        for p in changed:
            p[0] += 0.5
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b", max_shard_size="40kB")
    from_modules = compare_weights((a, b), progress=False)
    from_files = compare_weights((tmp_path / "a", tmp_path / "b"), progress=False)
    for table in (from_modules, from_files):
        moved = table[table.relative > 0]
        assert set(moved.block) == {1} and table.block.dropna().nunique() == 3
        assert moved.stable_rank.between(0.999, 32).all()
        assert sum("+" in line for line in weight_lines(table)) == 1
        assert plot_weights(table).axes[0].images[0].get_array().shape[1] == 3
    total = [(table.change**2).sum() for table in (from_modules, from_files)]  # files list each expert, modules a stack
    assert total[0] == pytest.approx(total[1], rel=1e-6)
    assert moved_tokens((a, b), tokenizer=object()).empty


def test_a_model_on_the_hub(tmp_path):
    "Its safetensors and JSON files are fetched, and no pickle; a name that is not there is refused."
    from conftest import make_model

    make_model(tmp_path / "m", 0)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"a pickle")
    code = f"""
from pathlib import Path
from huggingface_hub import HfApi
from crosscoder import BadInput, compare_weights
api = HfApi()
api.create_repo("me/m")
api.upload_folder(repo_id="me/m", folder_path={str(tmp_path / "m")!r})
table = compare_weights(("me/m", {str(tmp_path / "m")!r}), progress=False)
print(len(table), table.relative.max(), [p.name for p in Path({str(tmp_path)!r}).rglob("hub/**/pytorch_model.bin")])
try:
    compare_weights(("me/none", "me/m"))
except BadInput as e:
    print(e)
"""
    from test_hub import ME, env

    with running(users=ME) as server:
        home = {**env(server, tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].endswith(" 0.0 []"), lines
    assert lines[1].startswith("'me/none' is no folder here, and the hub did not give it either"), lines
