"`diff()` in Python and `crosscoder diff` are one thing: the same settings, the same run."

import shlex
import shutil

import pytest
from conftest import cli

from crosscoder import BadInput, Run, diff

SMALL = {"dict_size": 64, "k": 4, "steps": 30, "batch_size": 64, "wandb": False}
FILES = ("model.safetensors", "metrics.jsonl", "evaluation.json", "features.parquet", "texts.json")


@pytest.fixture(scope="module")
def runs(models, files, tmp_path_factory):
    "The same run twice: from Python, and from the command that it notes."
    root = tmp_path_factory.mktemp("diff")
    texts = (f"{files}/fineweb.jsonl*50", f"{files}/toolrl.jsonl*30")
    run = diff(*models, out=root / "python", texts=texts, layer=2, **SMALL)
    command = run.config["run"]["command"].replace(str(root / "python"), str(root / "command"))
    done = cli(*shlex.split(command)[1:])
    assert done.returncode == 0, done.said
    return run, Run(root / "command")


def test_the_same_bits(runs):
    by_python, by_command = runs
    for name in FILES:
        assert (by_python.path / name).read_bytes() == (by_command.path / name).read_bytes(), name
    assert sorted(p.name for p in by_python.path.iterdir()) == sorted(p.name for p in by_command.path.iterdir())


def test_the_same_settings(runs):
    configs = [{**r.config, "run": dict(r.config["run"])} for r in runs]
    command, _ = (c["run"].pop("command") for c in configs)
    assert configs[0] == configs[1]
    assert "--no-wandb" in command and "--dict-size 64" in command and "--lr" not in command


def test_a_run_is_objects(runs):
    run, _ = runs
    train_part, test_part = run.parts()
    assert len(train_part) + len(test_part) == len(run.store) and run.evaluation["rows"] == len(test_part)
    assert run.crosscoder().dict_size == len(run.features) == 64 and run.history.step.iloc[-1] == 30
    assert "64 features" in repr(run) and [c["source"] for c in run.text_counts] == ["fineweb", "toolrl"]


def test_it_resumes(runs, tmp_path, models, files):
    "A run without its last stages gets them, and the ones that are there stay."
    shutil.copytree(runs[0].path, tmp_path / "again")
    before = (tmp_path / "again/model.safetensors").stat().st_mtime_ns
    (tmp_path / "again/evaluation.json").unlink()
    texts = (f"{files}/fineweb.jsonl*50", f"{files}/toolrl.jsonl*30")
    again = diff(*models, out=tmp_path / "again", texts=texts, layer=2, **SMALL)
    assert again.evaluation == runs[0].evaluation
    assert (tmp_path / "again/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="was made with activations.layer = 2, and 1 is asked for now"):
        diff(*models, out=tmp_path / "again", texts=texts, layer=1, **SMALL)


def test_a_model_against_itself_is_a_run(models, files, tmp_path):
    "Nothing acts, nothing is labelled, and every stage and the page are there, the second time too."
    texts = (f"{files}/fineweb.jsonl*50", f"{files}/toolrl.jsonl*30")
    for _ in range(2):
        run = diff(models[1], models[1], out=tmp_path / "null", texts=texts, layer=2, **SMALL)
        assert run.changes.features is None and (run.path / "report.html").exists()
        assert not run.features.label.isin(["A", "B"]).any() and not run.features.turned.any()
        assert not run.features.change.isin(["amplified", "suppressed"]).any()


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(BadInput, match="there is no setting 'layers'; there are model_a, model_b"):
        diff(out=tmp_path / "x", layers=3)
    assert not (tmp_path / "x").exists()
    assert cli("diff", "--out", tmp_path / "x", "--k", 0).returncode == 2
    assert not (tmp_path / "x").exists()
