"The published card: its files, its numbers and its three snippets, word for word."

import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import HERE, make_model
from safetensors.torch import load_file

from crosscoder.model import dfc
from crosscoder.model.crosscoder import CrossCoder, DFCCrossCoder
from crosscoder.training.config import TrainConfig
from crosscoder.training.step import Trainer

FIXTURES = sorted(p.parent for p in (HERE / "fixtures").glob("*/model.pt"))

QUICK_START = """
import torch
from huggingface_hub import hf_hub_download

# Download model files
repo_id = "antebe1/cc-D16k-k90"
for fname in ["model.pt", "config.json", "dfc.py"]:
    hf_hub_download(repo_id=repo_id, filename=fname, local_dir="./model")

# Load the crosscoder
import sys; sys.path.insert(0, "./model")
from dfc import DFCCrossCoder

dfc = DFCCrossCoder.load("./model", device="cuda")
print(f"Loaded: dict_size={dfc.dict_size}, k={dfc.k}")
"""

EXTRACT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

# Load both models
model_a = AutoModelForCausalLM.from_pretrained("chengq9/ToolRL-Qwen2.5-3B", device_map="cuda:0")
model_b = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-3B", device_map="cuda:1")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-3B")

# Get activations from layer 13
# NOTE: hidden_states[0] = embeddings, hidden_states[i] = output of layer i-1
#       so layer 13 activations are at index 13+1
text = "Use the search tool to find recent papers on RLHF"
inputs = tokenizer(text, return_tensors="pt")

with torch.no_grad():
    out_a = model_a(**inputs.to("cuda:0"), output_hidden_states=True)
    out_b = model_b(**inputs.to("cuda:1"), output_hidden_states=True)
    act_a = out_a.hidden_states[13 + 1][:, -1, :]  # last token, layer 13
    act_b = out_b.hidden_states[13 + 1][:, -1, :]

# Stack and encode
activations = torch.stack([act_a.cpu(), act_b.cpu()], dim=1)  # (1, 2, 2048)
features = dfc.encode(activations.to(dfc.W_enc.device))

print(f"Active features: {(features > 0).sum().item()} / {dfc.dict_size}")
"""

ANALYZE = """
stats = dfc.feature_stats(features)
print(f"L0 total:    {stats['l0_total']:.1f}")
print(f"L0 A-excl:   {stats['l0_a_excl']:.1f}")
print(f"L0 B-excl:   {stats['l0_b_excl']:.1f}")
print(f"L0 shared:   {stats['l0_shared']:.1f}")

# Check reconstruction quality
recon, feats = dfc(activations.to(dfc.W_enc.device))
mse = torch.nn.functional.mse_loss(recon.cpu(), activations)
print(f"Reconstruction MSE: {mse.item():.6f}")
"""


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    "Two tiny models of the fixtures' width with a layer 13."
    root = tmp_path_factory.mktemp("wide")
    return make_model(root / "a", 0, d=32, layers=15), make_model(root / "b", 1, d=32, layers=15)


def run_snippets(published, models, tmp_path, monkeypatch, capsys):
    "The three snippets in one namespace; the hub is a folder, the device the CPU, the models are tiny."
    fetch = lambda repo_id, filename, local_dir: shutil.copy(
        Path(published) / filename, (Path(local_dir).mkdir(exist_ok=True), Path(local_dir) / filename)[1]
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=fetch, __spec__=None))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "dfc", raising=False)
    space, swap = (
        {},
        {
            '"cuda"': '"cpu"',
            '"cuda:0"': '"cpu"',
            '"cuda:1"': '"cpu"',
            "chengq9/ToolRL-Qwen2.5-3B": models[0],
            "Qwen/Qwen2.5-3B": models[1],
        },
    )
    for i, code in enumerate((QUICK_START, EXTRACT, ANALYZE)):
        if i == 1:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)  # transformers needs the real hub library
        for old, new in swap.items():
            code = code.replace(old, new)
        exec(code, space)
    sys.modules.pop("dfc", None)
    return space, capsys.readouterr().out


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda f: f.name)
def test_fixture_reproduces_expected(folder):
    with pytest.warns(UserWarning, match="no normalizer statistics"):
        cc = DFCCrossCoder.load(folder)
    expected, numbers = load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())
    with torch.no_grad():
        recon, features = cc(expected["x"])
    torch.testing.assert_close(features, expected["features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(recon, expected["reconstruction"], atol=1e-5, rtol=0)
    assert abs((recon - expected["x"]).square().mean().item() - numbers["mse"]) < 1e-6
    assert cc.verify_partition_integrity() == numbers["partition_integrity"]
    config = json.loads((folder / "config.json").read_text())
    assert (cc.n_a, cc.n_b, cc.n_shared) == (config["n_a"], config["n_b"], 256 - config["n_a"] - config["n_b"])
    for key, value in cc.feature_stats(features).items():
        want = numbers["feature_stats"][key]
        assert value == (0.0 if want != want else pytest.approx(want, abs=1e-6)), (
            key
        )  # the authors' nan of an empty partition is our 0
    assert [list(t.shape) for t in (cc.W_enc, cc.b_enc, cc.W_dec, cc.b_dec)] == [
        numbers["state_dict"][k] for k in ("W_enc", "b_enc", "W_dec", "b_dec")
    ]


def test_masks_act_on_forbidden_weights(tmp_path):
    "A file whose forbidden weights are not zero behaves as if its masks were applied, in both classes."
    source = HERE / "fixtures" / "dfc-D256-excl5-k8"
    state = torch.load(source / "model.pt", weights_only=True)
    state["W_enc"][1, :, 0], state["W_dec"][0, 1] = 5.0, 7.0  # feature 0 is A's alone
    shutil.copy(source / "config.json", tmp_path)
    torch.save(state, tmp_path / "model.pt")
    expected = load_file(source / "expected.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (CrossCoder.load(tmp_path), dfc.DFCCrossCoder.load(tmp_path)):
            with torch.no_grad():
                torch.testing.assert_close(model(expected["x"])[0], expected["reconstruction"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda f: f.name)
def test_snippets_run_on_the_fixtures(folder, wide_models, tmp_path, monkeypatch, capsys):
    published = tmp_path / "published"
    shutil.copytree(folder, published)
    shutil.copy(dfc.__file__, published / "dfc.py")
    space, out = run_snippets(published, wide_models, tmp_path, monkeypatch, capsys)
    assert "Loaded: dict_size=256, k=8" in out and "Reconstruction MSE: " in out
    with pytest.warns(UserWarning):
        cc = CrossCoder.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(space["features"], cc.encode(space["activations"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(space["recon"], cc(space["activations"])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_snippets_run_on_a_folder_we_wrote(activation, wide_models, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    x = torch.randn(500, 2, 32) * torch.tensor([1.0, 4.0])[:, None] + 2
    cc = CrossCoder((32, 32), 128, 8, (0.05, 0.05), activation, "zscore").fit_normalizer(x)
    trainer = Trainer(cc, TrainConfig(steps=5, batch_size=100))
    for i in range(5):
        trainer.step(x[100 * i : 100 * i + 100])
    cc.eval().info = {
        "models": list(wide_models),
        "layer": 13,
        "train": {"steps": 5, "lr": 1e-3, "batch_size": 100, "sparsity_coef": 0.0},
    }
    cc.save(tmp_path / "published", format="card")
    names = {"model.pt", "config.json", "hparams.json", "dfc.py", "demo.py", "requirements.txt"}
    assert {p.name for p in (tmp_path / "published").iterdir()} == names
    space, out = run_snippets(tmp_path / "published", wide_models, tmp_path, monkeypatch, capsys)
    assert "Loaded: dict_size=128, k=8" in out and "L0 total:" in out
    raw = space["activations"]
    with torch.no_grad():
        torch.testing.assert_close(
            space["features"], cc.encode(raw), atol=1e-5, rtol=1e-4
        )  # raw activations, normalizer folded in
        torch.testing.assert_close(space["recon"], cc(raw)[0], atol=1e-4, rtol=1e-4)


def test_dfc_file_needs_torch_alone(tmp_path):
    import subprocess

    cc = CrossCoder((8, 8), 32, 4, activation="topk")
    cc.save(tmp_path, format="card")
    code = (
        "import sys; from dfc import DFCCrossCoder; import torch; m = DFCCrossCoder.load('.'); m(torch.zeros(1, 2, 8));"
        "print([n for n in ('crosscoder', 'fastcore', 'safetensors', 'transformers', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_demo_runs(wide_models, tmp_path):
    import subprocess

    cc = CrossCoder((32, 32), 128, 8, (0.1, 0.1), "topk")
    cc.info = {"models": list(wide_models), "layer": 13}
    cc.save(tmp_path, format="card")
    done = subprocess.run([sys.executable, "demo.py", "find the paper"], cwd=tmp_path, capture_output=True, text=True)
    assert "active features: " in done.stdout and "feature " in done.stdout, done.stderr


def test_hparams_have_the_cards_keys(tmp_path):
    card = json.loads((FIXTURES[0] / "hparams.json").read_text())
    cc = CrossCoder((32, 32), 256, 8, (0.05, 0.05), "topk")
    cc.save(tmp_path, format="card")
    ours = json.loads((tmp_path / "hparams.json").read_text())
    assert set(card) <= set(ours)
    assert (ours["architecture"], ours["dict_size"], ours["k"]) == ("DFC", 256, 8)
