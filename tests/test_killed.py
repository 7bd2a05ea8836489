"`kill -9` at ten random instants of extraction and of training: the files that come out are the same bits as without."

import os
import re
import subprocess
import sys

import pytest
from conftest import HERE

from crosscoder import ActivationStore, PlantedPair

KILLS = 10


def run(*args, seconds="0 0"):
    "Kills, how many of them when a part was on disk, and seconds as killed.py wants them."
    done = subprocess.run(
        [sys.executable, "killed.py", *map(str, args)],
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "SECONDS": seconds},
    )
    assert done.returncode == 0, done.stderr
    kills, halfway, seconds = re.search(r"killed (\d+) times, (\d+) of them halfway; (.*)", done.stdout).groups()
    return int(kills), int(halfway), seconds


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed", [0])
def test_extraction(seed, models, tmp_path):
    *_, seconds = run("extract", tmp_path / "whole", 0, 0, *models)
    kills, halfway, _ = run("extract", tmp_path / "cut", KILLS, seed, *models, seconds=seconds)
    assert kills == KILLS and halfway >= 2, (
        f"of {KILLS} kills {kills} came before the end, {halfway} when a part was on disk"
    )
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert len(whole) > 15 and whole == cut
    assert ActivationStore(tmp_path / "cut").manifest["complete"]


@pytest.mark.parametrize("seed", [0])
def test_training(seed, tmp_path):
    x, _ = PlantedPair(n_concepts=64, d=32, exclusive=(4, 4)).sample(8000)
    ActivationStore.from_tensors(tmp_path / "store", x.unbind(1))
    *_, seconds = run("train", tmp_path / "whole", 0, 0, tmp_path / "store")
    kills, halfway, _ = run("train", tmp_path / "cut", KILLS, seed, tmp_path / "store", seconds=seconds)
    assert kills == KILLS and halfway >= 2, (
        f"of {KILLS} kills {kills} came before the end, {halfway} when a part was on disk"
    )
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    run_of = ("config.json", "metrics.jsonl", "model.safetensors")
    assert {str(name) for name in whole} == {
        *run_of,
        *(f"difference/{name}" for name in (*run_of, "placed.safetensors")),
    }
    assert whole == cut
