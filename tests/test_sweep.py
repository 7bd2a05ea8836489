"A sweep from the command line: the card's 48, killed and resumed, a cell that fails, what is refused and logged."

import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from conftest import cli

from crosscoder import ActivationStore, PlantedPair
from crosscoder.sweep.grid import card_specs

GRID = {
    "settings": {
        "dict_size": 128,
        "steps": 300,
        "batch_size": 500,
        "differences": 0,
        "checkpoint_every": 20,
        "log_every": 10,
        "lr": "2e-3",
        "precision": "fp32",
    },
    "axes": {"k": [4, 8], "exclusive": ["0,0", "0.1,0.1"]},
    "runs": [{"name": "hopeless", "lr": 1e30, "clip": 1e30, "seed": 1}],
}
CARD_KEYS = (
    "architecture model_a model_b layer activation_dim dict_size k model_a_exclusive_pct model_b_exclusive_pct steps "
    "lr train_batch sparsity_coef exclusive_sparsity_coef loss wandb_project"
).split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    "A planted store, a grid, and the table of the sweep that nothing happened to."
    root = tmp_path_factory.mktemp("sweep")
    x, _ = PlantedPair(n_concepts=128, d=32, exclusive=(6, 6)).sample(20_000)
    ActivationStore.from_tensors(root / "store", x.unbind(1))
    (root / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    done = cli("sweep", root / "grid.yaml", "--out", root / "whole", "--store", root / "store", "--no-wandb", env=ENV)
    assert done.returncode == 1 and "1 of 5 runs failed" in done.said, done.said
    return root, done


def weights(sweep):
    return {f.parent.name: f.read_bytes() for f in (sweep / "runs").glob("*/model.safetensors")}


def test_one_command(setting):
    root, done = setting
    table = pd.read_csv(root / "whole/table.csv").set_index("name")
    assert table.state.to_dict() == {
        **dict.fromkeys(["k4-exclusive0_0", "k4-exclusive0.1_0.1", "k8-exclusive0_0", "k8-exclusive0.1_0.1"], "done"),
        "hopeless": "failed",
    }
    assert "the learning rate 1e+30 is too high" in done.said and "hopeless failed" in done.said
    assert table.fve["k8-exclusive0_0"] > table.fve["k4-exclusive0_0"] + 0.02
    assert {p.name for p in (root / "whole").iterdir()} == {
        "runs",
        "sweep.json",
        "table.csv",
        "effects.csv",
        "front.png",
        "effects.png",
        "settings.png",
    }
    assert not list((root / "whole").rglob("checkpoint")) or [
        p.parent.name for p in (root / "whole").rglob("checkpoint")
    ] == ["hopeless"]


def test_killed_three_times(setting):
    root, _ = setting
    command = [
        sys.executable,
        "-c",
        "from crosscoder.cli import app; app()",
        "sweep",
        root / "grid.yaml",
        "--out",
        root / "killed",
        "--store",
        root / "store",
        "--no-wandb",
    ]
    seen, runs = [], root / "killed/runs"
    for kill in range(3):
        process = subprocess.Popen(
            command, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        rows = lambda: sum(len(f.read_text().splitlines()) for f in runs.glob("*/metrics.jsonl"))
        before, deadline = rows(), time.monotonic() + 60
        while rows() < before + 25 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(
            (len(list(runs.glob("*/checkpoint/state.safetensors"))), len(list(runs.glob("*/model.safetensors"))))
        )
    assert process.returncode == -signal.SIGKILL and seen[0][0] > 0, seen
    done = cli("sweep", root / "grid.yaml", "--out", root / "killed", "--store", root / "store", "--no-wandb", env=ENV)
    assert done.returncode == 1, done.said
    assert (root / "killed/table.csv").read_bytes() == (root / "whole/table.csv").read_bytes()
    assert weights(root / "killed") == weights(root / "whole")


def test_nothing_is_done_twice(setting):
    root, _ = setting
    times = lambda: {
        f: f.stat().st_mtime_ns for f in (root / "whole/runs").rglob("*") if f.is_file() and f.parent.name != "hopeless"
    }
    before = times()
    assert (
        cli(
            "sweep", root / "grid.yaml", "--out", root / "whole", "--store", root / "store", "--no-wandb", env=ENV
        ).returncode
        == 1
    )
    assert {f.name for f, t in times().items() if before.get(f) != t} == set()


def test_the_names_of_the_card():
    done = cli("sweep", "--preset", "card", "--list")
    names = done.stdout.split()
    assert done.returncode == 0 and len(names) == len(set(names)) == 48
    assert all(
        re.fullmatch(r"(cc-D(8|16)k(-nol1)?|dfc-D(8|16)k-excl(3|5|10)(-freeexcl)?)-k(45|90|160)", n) for n in names
    )
    assert {"cc-D16k-k90", "cc-D16k-nol1-k90", "dfc-D8k-excl5-k45", "dfc-D8k-excl5-freeexcl-k45"} <= set(names)


@pytest.mark.parametrize("cell", card_specs(), ids=lambda c: c.name)
def test_hparams_of_the_card(cell, tmp_path):
    "Everything but the width is at full size; what the models are called comes from the store."
    cc = cell.model().build((8, 8))
    cc.info |= {
        "models": ["chengq9/ToolRL-Qwen2.5-3B", "Qwen/Qwen2.5-3B"],
        "layer": 13,
        "wandb_project": "dfc-crosscoder-sweep",
        "train": vars(cell.training()),
    }
    cc.fit_normalizer(torch.randn(64, 2, 8))
    cc.save(tmp_path, format="card")
    found = json.loads((tmp_path / "hparams.json").read_text())
    kind, size, k = re.match(r"(cc|dfc)-D(\d+)k-.*?k(\d+)$", cell.name).groups()
    pct = int(m.group(1)) / 100 if (m := re.search(r"excl(\d+)-", cell.name)) else 0.0
    assert "trained_at" in found  # known once it was trained: `write_folder` fills it in
    assert {key: found[key] for key in CARD_KEYS} == {
        "architecture": "DFC" if kind == "dfc" else "CrossCoder",
        "model_a": "chengq9/ToolRL-Qwen2.5-3B",
        "model_b": "Qwen/Qwen2.5-3B",
        "layer": 13,
        "activation_dim": 8,
        "dict_size": int(size) * 1024,
        "k": int(k),
        "model_a_exclusive_pct": pct,
        "model_b_exclusive_pct": pct,
        "steps": 9000,
        "lr": 1e-4,
        "train_batch": 1024,
        "sparsity_coef": 0.0 if "nol1" in cell.name else 1e-3,
        "exclusive_sparsity_coef": 1e-3 if kind == "dfc" and "freeexcl" not in cell.name else 0.0,
        "loss": "MSE" if "nol1" in cell.name else "MSE + L1 sparsity",
        "wandb_project": "dfc-crosscoder-sweep",
    }


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--axis", "k=8 300", "--dict-size", 64],
            "1 of 2 cells are impossible. k300: k is 300 and the dictionary has 64 features",
        ),
        (["--axis", "kk=8"], "there is no setting 'kk'; did you mean k?"),
        (["--axis", "k"], 'expected a setting and its values, as in --axis "k=16 32 64"'),
        (["--axis", "k=8 8"], "two runs have one name: k8 and k8"),
        (["--axis", "k=8 9", "--k", 10], "an option that replaces an axis): k8 and k9"),
        ([], "a sweep needs one grid"),
        (["--preset", "card", "--axis", "k=3"], "a sweep needs one grid"),
        (["--axis", "k=8", "--axis", "k=9"], "the axis k is given twice"),
        (["--axis", "k=8", "--ray", ""], "--ray is empty"),
        (["--axis", "k=8", "--gpus", 1], "are for a cluster: give its address with --ray"),
        (["--axis", "k=8", "--ray", "local", "--device", "cpu"], "--device is for this machine"),
        (["--axis", "k=3", "--scale", 0.1], "scale makes the card's sweep smaller"),
        (["--preset", "card", "--scale", 0], "scale is 0.0: expected a share of the card's size"),
        (["none.yaml"], "the grid none.yaml could not be read: No such file"),
        (["--axis", "k=3", "--store", "nowhere"], "nowhere is not an activation store"),
    ],
)
def test_what_is_refused(arguments, said, tmp_path):
    done = cli("sweep", *arguments, "--out", tmp_path / "s", "--no-wandb", cwd=tmp_path)
    assert done.returncode == 2 and said in done.said and "Traceback" not in done.said, done.said
    assert not list(tmp_path.glob("s/runs/*"))


def test_an_empty_grid(tmp_path):
    (tmp_path / "empty.yaml").write_text("axes: {k: []}")
    done = cli("sweep", tmp_path / "empty.yaml", "--list")
    assert done.returncode == 2 and "the grid has no cells" in done.said


def test_one_process_at_a_time(setting):
    from filelock import FileLock

    root, _ = setting
    with FileLock(root / "whole/.lock"):
        done = cli(
            "sweep", root / "grid.yaml", "--out", root / "whole", "--store", root / "store", "--no-wandb", env=ENV
        )
    assert done.returncode == 2 and "another process writes into" in done.said


def test_a_damaged_evaluation_is_made_again(setting):
    root, _ = setting
    path = root / "whole/runs/k4-exclusive0_0/evaluation.json"
    before = path.read_bytes()
    path.write_bytes(before[:20])
    cli("sweep", root / "grid.yaml", "--out", root / "whole", "--store", root / "store", "--no-wandb", env=ENV)
    assert path.read_bytes() == before


def test_another_store_is_refused(setting, tmp_path):
    root, _ = setting
    x, _ = PlantedPair(n_concepts=128, d=32, exclusive=(6, 6)).sample(2000)
    ActivationStore.from_tensors(tmp_path / "other", x.unbind(1))
    before = (root / "whole/sweep.json").read_bytes()
    done = cli("sweep", root / "grid.yaml", "--out", root / "whole", "--store", tmp_path / "other", "--no-wandb")
    assert done.returncode == 2 and "its runs could not be compared" in done.said
    assert (root / "whole/sweep.json").read_bytes() == before


def test_every_run_is_logged(setting, tmp_path):
    from crosscoder.training.tracking import read_offline

    root, _ = setting
    done = cli(
        "sweep",
        root / "grid.yaml",
        "--out",
        tmp_path / "logged",
        "--store",
        root / "store",
        "--project",
        "p",
        env={**ENV, "WANDB_MODE": "offline"},
    )
    assert done.returncode == 1, done.said
    table = pd.read_csv(tmp_path / "logged/table.csv").set_index("name")
    for name in table.index[table.state == "done"]:
        folder = tmp_path / "logged/runs" / name
        run = read_offline(folder)
        assert (run["project"], run["group"], run["name"]) == ("p", "logged", name)
        assert run["config"]["k"] == table.k[name] and run["config"]["cell"]["name"] == name
        assert run["summary"]["fve"] == pytest.approx(table.fve[name], abs=1e-9)
        curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = run["history"].set_index("_step").loss.dropna()
        assert {r["step"]: r["loss"] for r in curve} == pytest.approx(logged.to_dict())
        assert any("model.safetensors" in files for files in run["artifacts"].values())
    assert read_offline(tmp_path / "logged/runs/hopeless")["exit_code"] != 0
