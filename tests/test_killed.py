"`kill -9` at ten random instants of extraction and of training: the files that come out are the same bits as without."
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import HERE

from crosscoder import ActivationStore, PlantedPair

KILLS = 10


def run(*args, whole=4.0):
    start = time.monotonic()
    done = subprocess.run([sys.executable, "killed.py", *map(str, args)], cwd=HERE, capture_output=True, text=True, env={**os.environ, "WHOLE": str(whole)})
    assert done.returncode == 0, done.stderr
    return int(re.search(r"killed (\d+) times", done.stdout)[1]), time.monotonic() - start


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def imports():
    "Seconds that a process needs before it does anything."
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers; from crosscoder import extract, train"], check=True, cwd=HERE)
    return time.monotonic() - start


@pytest.mark.parametrize("seed", [0])
def test_extraction(seed, models, imports, tmp_path):
    _, seconds = run("extract", tmp_path / "whole", 0, 0, *models)
    kills, _ = run("extract", tmp_path / "cut", KILLS, seed, *models, whole=max(1.0, seconds - imports))
    assert kills == KILLS, f"only {kills} of {KILLS} kills came before the end"
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert len(whole) > 15 and whole == cut
    assert ActivationStore(tmp_path / "cut").manifest["complete"]


@pytest.mark.parametrize("seed", [0])
def test_training(seed, imports, tmp_path):
    x, _ = PlantedPair(n_concepts=64, d=32, exclusive=(4, 4)).sample(8000)
    ActivationStore.from_tensors(tmp_path / "store", x.unbind(1))
    _, seconds = run("train", tmp_path / "whole", 0, 0, tmp_path / "store")
    kills, _ = run("train", tmp_path / "cut", KILLS, seed, tmp_path / "store", whole=max(1.0, seconds - imports))
    assert kills == KILLS, f"only {kills} of {KILLS} kills came before the end"
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert set(whole) == {"config.json", "metrics.jsonl", "model.safetensors"}
    assert whole == cut
