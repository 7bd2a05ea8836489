"Whole runs through the installed command, on a tiny pair and local files."

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from conftest import cli

from crosscoder import ActivationStore, CrossCoder

SMALL = ["--dict-size", 64, "--k", 4, "--steps", 30, "--batch-size", 64, "--no-wandb"]


@pytest.fixture(scope="module")
def run(models, files, tmp_path_factory):
    "A finished `diff` of the tiny pair."
    out = tmp_path_factory.mktemp("runs") / "tiny"
    done = cli(
        "diff",
        "--out",
        out,
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--texts",
        f"{files}/fineweb.jsonl*50",
        "--texts",
        f"{files}/toolrl.jsonl*30",
        "--layer",
        2,
        *SMALL,
    )
    assert done.returncode == 0, done.said
    return out, done, models, files


def test_diff_leaves_everything(run):
    out, done, *_ = run
    names = {p.name for p in out.iterdir()}
    assert names == {
        "activations",
        "changes",
        "config.json",
        "difference",
        "evaluation.json",
        "features.parquet",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "texts.json",
    }
    assert "Look at" in done.said and str(out / "report.html") in done.said
    assert "toolrl: 30 texts, 20 distinct, 10 repeats" in done.said  # repeats are counted and said
    table, result = pd.read_parquet(out / "features.parquet"), json.loads((out / "evaluation.json").read_text())
    assert len(table) == 64 and set(table.label) <= {"A", "B", "shared", "undecided", "dead"}
    assert list(table.partition) == ["shared"] * 64 and table.share.between(0, 1).any() and "comes_back" not in table
    assert "difference: 32 candidates from" in done.said  # half as many as features
    assert 0 < result["fve_a"] < 1 and result["rows"] == len(ActivationStore(out / "activations").split()[1])


def test_config_says_how_to_run_it_again(run):
    config = json.loads((run[0] / "config.json").read_text())
    assert set(config) >= {"run", "pair", "texts", "activations", "split", "model", "train", "data"}
    assert (
        set(config["run"]["versions"]) == {"python", "crosscoder", "torch", "transformers"}
        and "diff" in config["run"]["command"]
    )


def test_again_does_nothing_twice(run):
    out, _, models, files = run
    before = {p: p.stat().st_mtime_ns for p in (out / "model.safetensors", *(out / "activations").iterdir())}
    done = cli(
        "diff",
        "--out",
        out,
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--texts",
        f"{files}/fineweb.jsonl*50",
        "--texts",
        f"{files}/toolrl.jsonl*30",
        "--layer",
        2,
        *SMALL,
    )
    assert done.returncode == 0, done.said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_partition_and_three_seeds(run):
    "More seeds can be added to a run that is finished; the first stays what it is."
    out, _, models, files = run
    before, again = (out / "model.safetensors").read_bytes(), out.with_name("seeds")
    shutil.copytree(out, again)
    done = cli(
        "diff",
        "--out",
        again,
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--texts",
        f"{files}/fineweb.jsonl*50",
        "--texts",
        f"{files}/toolrl.jsonl*30",
        "--layer",
        2,
        *SMALL,
        "--seeds",
        3,
    )
    assert done.returncode == 0, done.said
    assert (again / "model.safetensors").read_bytes() == before and "came back in all 2 other seeds" in done.said
    table = pd.read_parquet(again / "features.parquet")
    assert set(table.comes_back) <= {0, 1, 2} and len(list((again / "seeds").iterdir())) == 2
    models_of = [CrossCoder.load(f) for f in sorted((again / "seeds").iterdir())]
    assert not models_of[0].decoder.equal(models_of[1].decoder)
    done = cli("train", "--out", again, *SMALL, "--exclusive", "0.05,0.05")  # another model does not fit this folder
    assert done.returncode == 2 and "exclusive" in done.said
    shutil.rmtree(again / "seeds"), shutil.rmtree(again / "difference"), (again / "model.safetensors").unlink()
    done = cli("train", "--out", again, *SMALL, "--exclusive", "0.05,0.05", "--differences", 0)
    assert done.returncode == 0, done.said
    assert (
        list(CrossCoder.load(again).partition.sizes) == [3, 3] and not (again / "difference").exists()
    )  # 5 % of 64, rounded down


def test_stages_over_the_same_folder(run, tmp_path):
    out, _, models, files = run
    pair = [
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--texts",
        f"{files}/fineweb.jsonl*50",
        "--texts",
        f"{files}/toolrl.jsonl*30",
        "--layer",
        2,
    ]
    shutil.copytree(out / "changes", tmp_path / "r" / "changes")  # a stage of `diff` without a command of its own
    for command in (["extract", *pair], ["train", *SMALL], ["evaluate"], ["features", "--show", 1], ["report"]):
        done = cli(command[0], "--out", tmp_path / "r", *command[1:])
        assert done.returncode == 0, (command, done.said)
    for name in ("model.safetensors", "evaluation.json", "metrics.jsonl"):  # the same stages, the same bits
        assert (tmp_path / "r" / name).read_bytes() == (out / name).read_bytes(), name


def test_card_preset(models, files, tmp_path):
    "The card's recipe on tiny models in folders and local files with those data sets' schemas."
    done = cli(
        "diff",
        "--preset",
        "card",
        "--out",
        tmp_path / "card",
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--layer",
        1,
        "--texts",
        f"{files}/fineweb.jsonl*40",
        "--texts",
        f"{files}/toolrl.jsonl*40",
        "--dict-size",
        128,
        "--steps",
        20,
    )
    assert done.returncode == 0, done.said
    config = json.loads((tmp_path / "card" / "config.json").read_text())
    train = config["train"]
    assert (
        train["batch_size"],
        train["lr"],
        train["clip"],
        train["sparsity_coef"],
        train["exclusive_sparsity_coef"],
    ) == (1024, 1e-4, 1.0, 1e-3, 0)
    assert config["model"] == {
        "d_in": [16, 16],
        "dict_size": 128,
        "k": 90,
        "exclusive": [0, 0],
        "activation": "topk",
        "normalizer": "zscore",
    }
    assert config["activations"]["tokens"] == "last" and config["texts"]["shuffle"] is False
    store = ActivationStore(tmp_path / "card" / "activations")
    assert (len(store), len(store.texts), store.rows.shared.sum()) == (60, 80, 80)  # one row a text, repeats once
    assert list(store.texts.source[[0, 39, 40]]) == ["fineweb", "fineweb", "toolrl"]
    assert (tmp_path / "card" / "wandb").is_dir()  # offline, since nobody is logged in
    cc = CrossCoder.load(tmp_path / "card")
    cc.save(tmp_path / "published", format="card")
    hparams = json.loads((tmp_path / "published" / "hparams.json").read_text())
    assert (hparams["architecture"], hparams["layer"], hparams["train_batch"], hparams["loss"]) == (
        "CrossCoder",
        1,
        1024,
        "MSE + L1 sparsity",
    )
    assert hparams["wandb_project"] == "dfc-crosscoder-sweep"


def test_a_corrected_command_works_in_the_same_folder(models, files, tmp_path):
    "What was refused before it left anything binds nobody."
    pair = [
        "--out",
        tmp_path / "r",
        "--model-a",
        models[0],
        "--model-b",
        models[1],
        "--texts",
        f"{files}/fineweb.jsonl*20",
        "--layer",
        1,
    ]
    assert cli("extract", *pair, "--column", "body").returncode == 2
    assert cli("extract", *pair).returncode == 0
    again = cli("extract", *pair, "--max-tokens", 9)  # now there is something, and it does bind
    assert again.returncode == 2 and "max_tokens = 512, and 9 is asked" in again.said


def test_copies_of_a_text_stay_together(run):
    out = run[0]
    store = ActivationStore(out / "activations")
    parts = [{store.texts.text[t][:end] for t, end in zip(p.rows.text, p.rows.end)} for p in store.split()]
    assert len(store.texts) > store.texts.text.nunique() and not parts[0] & parts[1]
    assert sum(map(len, parts)) == len(store)  # every beginning once


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_page_in_a_browser(run, tmp_path):
    "The page opens without a network, shows its figures, and a hostile text stays a text."
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync"
    done = subprocess.run(
        ["chromium", *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{run[0]}/report.html"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert (
        "taken over" not in title
        and "<script" not in done.stdout
        and " onerror=" not in re.sub(r"&lt;img.*?&gt;", "", done.stdout)
    )
    assert done.stdout.count("<svg") + done.stdout.count("<img") >= 3 and "http://" not in re.sub(
        r'xmlns(:\w+)?="[^"]*"', "", done.stdout.split("<body")[0]
    )
    assert "A partition is a hypothesis, not evidence" in done.stdout


def test_help_teaches():
    done = cli("--help")
    assert done.returncode == 0 and all(
        c in done.stdout for c in ("diff", "extract", "train", "evaluate", "features", "report")
    )
