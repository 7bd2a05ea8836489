"`crosscoder bench` through the installed command, at its quick sizes."

import json

import pytest
from conftest import cli


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "A quick bench of the parts that need no child process per figure."
    out = tmp_path_factory.mktemp("bench")
    done = cli("bench", "--quick", "--only", "step,floor,memory,accuracy", "--out", out)
    assert done.returncode == 0, done.said
    return done, out, json.loads((out / "bench.json").read_text())


def rows(found, name):
    return {r["name"]: r for r in found["tables"][name]["rows"]}


def test_says_what_was_measured_on_what(bench):
    done, out, found = bench
    assert (
        all(f"== {name}" in done.stdout for name in ("step", "floor", "memory", "accuracy"))
        and (out / "step.png").stat().st_size > 5000
    )
    assert found["config"]["batch"] == 128 and found["config"]["seed"] == 0 and found["machine"]["cores"] >= 1
    assert {"python", "torch", "crosscoder"} <= set(found["machine"]["versions"])


def test_every_timing_is_there(bench):
    table = rows(bench[2], "step")
    assert {"dense card", "crosscoder fp32", "crosscoder bf16"} <= set(table)
    for r in table.values():
        assert r["n"] == len(r["times"]) >= 5 and 0 < r["min"] <= r["median"] <= r["max"], r
    assert table["crosscoder bf16"]["ratio"] == 1 and table["dense card"]["ratio"] > 1
    missing = [note for note in bench[2]["tables"]["step"]["notes"] if "failed" in note]
    assert not missing, missing  # a rival may be absent, and says how to get it, but may not crash


def test_the_step_is_above_its_floor(bench):
    table = rows(bench[2], "floor")
    parts = [r for name, r in table.items() if name not in ("sum: the floor", "crosscoder bf16")]
    assert len(parts) == 6 and all(r["median"] > 0 for r in parts)
    assert max(r["median"] for r in parts) < table["sum: the floor"]["median"] <= table["crosscoder bf16"]["median"]


def test_memory_and_accuracy(bench):
    for r in rows(bench[2], "memory").values():
        assert 0.05 < r["start"] < r["peak"] < 8
    table = rows(bench[2], "accuracy")
    assert table["crosscoder fp32"]["difference"] < 5e-4 and table["crosscoder bf16"]["difference"] < 5e-3
    assert table["crosscoder fp32"]["gradient error"] < 1e-5 and table["crosscoder bf16"]["gradient error"] < 2e-2


def test_a_wrong_name_is_refused(tmp_path):
    done = cli("bench", "--quick", "--only", "speed", "--out", tmp_path)
    assert done.returncode == 2 and "no measurement is called 'speed': one of step, floor" in done.said


def test_a_measurement_that_is_gone_is_refused(tmp_path):
    done = cli("bench", "--quick", "--only", "step,variants", "--out", tmp_path)
    assert done.returncode == 2 and "no measurement is called 'variants'" in done.said
    assert "one of step, floor, memory, scaling, accuracy, extraction" in " ".join(done.said.split())
