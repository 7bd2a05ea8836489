"What changed before any dictionary, through the command, on the tiny pair."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cli
from typer.testing import CliRunner

from crosscoder import Run
from crosscoder.cli import app
from crosscoder.run.pipeline import prepare
from crosscoder.training.config import ModelConfig, TrainConfig

BLOCKS = 4  # of the tiny models
DIFFER = "The predictions of A and B differ "


def diff_of(models, files, *more):
    "The arguments of a diff of the tiny pair, on prose and tool use."
    pair = ["diff", "--model-a", models[0], "--model-b", models[1]]
    texts = ["--texts", f"{files}/fineweb.jsonl*12", "--texts", f"{files}/toolrl.jsonl*12"]
    return [str(word) for word in (*pair, *texts, *more)]


def run_here(*words):
    "The command in this process: its exit code and what it wrote."
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))


@pytest.fixture(scope="module")
def whole(models, files, tmp_path_factory):
    "A finished run whose layer the rule chose, with a bound that was passed."
    out = tmp_path_factory.mktemp("changes") / "run"
    small = ["--dict-size", 32, "--k", 4, "--steps", 10, "--batch-size", 64, "--no-wandb", "--test", 0.2]
    small += ["--feature-texts", 6]
    done = run_here(*diff_of(models, files, "--layer", "auto", "--fail-on", "kl.all>0", "--out", out, *small))
    return out, done


def test_stat_prints_blocks_layers_and_predictions(models, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_here(*diff_of(models, files, "--stat"))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    starting = lambda start: [line for line in lines if line.startswith(start)]
    for name in ("block", "layer"):
        assert [line.split("|")[0].split()[1] for line in starting(f"{name} ")] == [str(i) for i in range(BLOCKS)]
    assert len(starting("fineweb ")) == len(starting("toolrl ")) == 1
    assert "tokens of 8 texts" in starting("fineweb ")[0]
    assert len(starting(DIFFER)) == 1
    assert not list(tmp_path.iterdir())  # it leaves no files


def test_json_is_all_there_is_on_stdout(models, files, tmp_path):
    done = cli(*diff_of(models, files, "--stat", "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.said
    told = json.loads(done.stdout)
    assert set(told) == {"names", "numbers", "sentences", "labels"} and told["labels"] is None
    found = told["numbers"]
    assert all(set(n) == {"value", "low", "high"} for n in found.values())
    for name in ("kl.fineweb", "forgetting.toolrl"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["weights.block.0"]["value"] > 0 and found["weights.block.0"]["low"] is None
    assert {f"distance.{i}.all" for i in range(BLOCKS)} < set(found)
    assert told["sentences"][0].startswith(DIFFER)


@pytest.mark.parametrize(
    ("gate", "code", "said"),
    [
        ("kl.fineweb>1000", 0, ""),
        ("kl.fineweb>0", 3, "the lower end of its interval"),
        ("forgetting.prose>0.05", 2, "nothing of that name was measured; there is forgetting."),
    ],
)
def test_a_bound_decides_the_exit_code(models, files, gate, code, said):
    done = run_here(*diff_of(models, files, "--stat", "--fail-on", gate))
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.split())
    assert DIFFER in done.stdout  # what was found is said all the same


@pytest.mark.parametrize("gate", ["kl.fineweb", "kl.fineweb>much", "kl.fineweb>=1", ">1"])
def test_a_malformed_bound_is_refused_before_a_model_is_looked_for(gate):
    done = run_here("diff", "--stat", "--model-a", "nowhere", "--model-b", "nowhere", "--fail-on", gate)
    assert done.exit_code == 2
    assert repr(gate) in done.stderr and "nowhere" not in done.output


def test_a_run_with_a_passed_bound_is_finished_and_ends_with_3(whole):
    out, done = whole
    assert done.exit_code == 3, done.output
    assert "kl.all" in done.stderr and "is over 0" in done.stderr
    assert (out / "report.html").exists() and (out / "features.parquet").exists()


def test_the_layer_that_was_chosen_is_in_the_config(whole):
    out, done = whole
    config = json.loads((out / "config.json").read_text())
    layer = config["activations"]["layer"]
    assert type(layer) is int and 0 <= layer < BLOCKS
    assert f"layer {layer} of {BLOCKS}, chosen from" in done.output
    assert config["changes"] == {"output_texts": 24, "layer_texts": 4, "feature_texts": 6, "samples": 0, "amplify": 0.0}


def test_change_features_are_kept_and_on_the_page(whole):
    out, _ = whole
    features = Run(out).changes.features
    assert set(features.source) <= {"fineweb", "toolrl"} and len(features)
    first = features.iloc[0]
    assert first.closes_low <= first.closes <= first.closes_high
    page = (out / "report.html").read_text()
    assert page.count("makes B say more") == features.groupby(["source", "kind"]).ngroups
    assert ("What changed on" in page) == bool((features.over_control_low > 0).any())


def test_change_features_are_in_the_dictionary(whole):
    out, _ = whole
    run = Run(out)
    cc, found = run.crosscoder(), run.changes.features
    placed = cc.info["change_features"]
    order = [j for some in placed.values() for j in some]
    numbers = [j for j in order if j is not None]
    assert numbers == list(range(cc.dict_size - len(numbers), cc.dict_size)) and set(placed) == set(found.source)
    assert 0 < len(order) <= cc.k // 2 and bool((cc.frozen[numbers] == 2).all())  # half of k at most
    assert run.features.acts_on.dropna().index.tolist() == numbers
    each = len(order) // len(placed)
    placed_rows = found[(found.kind == "feature") & (found.number < each)]
    read = torch.tensor(np.stack(list(placed_rows["read"])), dtype=torch.float32)
    read = read[read.norm(dim=1) > 0]  # of each source, what is constant is in the bias
    assert len(order) - len(numbers) <= len(placed)
    raw = (cc.encoder / cc.unit)[numbers].detach()
    assert torch.cosine_similarity(raw, torch.cat([read, -read], 1)).min() > 0.9999  # as they were found


@pytest.mark.parametrize("k, placed", [(1, 0), (4, 2), (9, 4)])
def test_change_features_never_take_more_than_half_of_k(whole, tmp_path, k, placed):
    run = Run(whole[0])
    train_part, _ = run.parts()
    model = ModelConfig(dict_size=64, k=k, differences=0)
    cc = prepare(model, TrainConfig(), train_part, tmp_path, features=run.changes.features, progress=False)
    assert sum(map(len, cc.info.get("change_features", {}).values())) == placed


def test_a_run_gives_back_what_changed(whole):
    out, _ = whole
    found = Run(out).changes
    assert found is not None
    pd.testing.assert_frame_equal(found.weights, pd.read_parquet(out / "changes" / "weights.parquet"))
    assert found.layers.layer.unique().tolist() == list(range(BLOCKS))
    assert set(found.outputs.sources.source) <= {"fineweb", "toolrl", "all"}
    assert found.outputs.tokens.kl.gt(0).any() and len(found.contexts) > 0
    _, test = Run(out).parts()
    assert found.outputs.tokens.text.nunique() == len(test.numbers)  # held-out texts only
