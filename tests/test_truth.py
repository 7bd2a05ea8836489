"A small version of the study of planted truth: its thresholds fail if trainer, differences or label are broken."

import pytest
import torch

from crosscoder.analysis.evidence import evidence, label_features
from crosscoder.data.planted import planted_scores
from crosscoder.data.store import ActivationStore
from crosscoder.research.truth import Setting, planted_store, run_methods
from crosscoder.training.exclusive import find_differences
from crosscoder.training.loop import train

SMALL = {"steps": 1000, "rows": 150_000}
PLAIN = "crosscoder, batch top-k"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Half as many features as concepts; one shared concept in twenty has an unrelated direction in B."
    out = tmp_path_factory.mktemp("truth")
    return {
        g: {
            r["method"]: r
            for r in run_methods(
                Setting(geometry=g, rotated=25, **SMALL), (PLAIN, "DFC 10 %", "ours"), out, 20_000, 60_000
            )
        }
        for g in ("near", "affine")
    }


@pytest.mark.parametrize("geometry", ["near", "affine"])
def test_every_real_difference_and_nothing_else(table, geometry):
    ours = table[geometry]["ours"]
    assert ours["recall"] >= 0.9 and ours["precision"] >= 0.9, ours
    assert ours["rotated_called"] <= 0.01 and ours["false_shared"] == 0, ours


@pytest.mark.parametrize("geometry", ["near", "affine"])
def test_against_a_plain_crosscoder_and_a_partition(table, geometry):
    ours, plain, dfc = (table[geometry][m] for m in ("ours", PLAIN, "DFC 10 %"))
    assert plain["recall"] <= 0.5 and ours["f1"] >= plain["f1"] + 0.3
    assert (
        dfc["precision"] <= 0.6 and dfc["labelled"]["precision"] >= 0.9
    )  # the partition's word, and the label's on the same dictionary
    assert ours["fve"] >= plain["fve"] - 0.015 and abs(ours["l0"] - plain["l0"]) < 0.3


@pytest.mark.parametrize("geometry", ["near", "affine"])
def test_what_is_louder_and_what_is_quieter(tmp_path, geometry):
    (ours,) = run_methods(Setting(geometry=geometry, graded=24, **SMALL), ("ours",), tmp_path, 20_000, 60_000)
    said = ours["strengths"]
    assert said["found"] >= 0.6 and said["recall"] >= 0.8 and said["precision"] >= 0.9, said
    assert said["false"] <= 0.01 and 0.6 < said["slope"] < 1.2, said  # a concept four times as loud has two features


@pytest.mark.parametrize("turned", [False, True])
def test_a_model_against_itself(tmp_path, turned):
    "No feature is exclusive, nor behind a random rotation; a one-sided partition does not help."
    s = Setting(geometry="near", **SMALL)
    rotation = (
        torch.linalg.qr(torch.randn(s.d, s.d, generator=torch.Generator().manual_seed(1))).Q
        if turned
        else torch.eye(s.d)
    )
    stores = []
    for name, rows, seed in (("train", 100_000, 0), ("test", 40_000, 5)):
        x = planted_store(s.pair(), tmp_path / f"{name}_pair", rows, seed).read(0, rows)[0]
        stores.append(ActivationStore.from_tensors(tmp_path / name, [x, x @ rotation]))
    cc = s.crosscoder(exclusive=(0.05, 0.05))
    assert find_differences(cc, stores[0], s.config(steps=300), progress=False).kept.sum() == 0
    train(cc, stores[0], s.config(steps=300), progress=False)
    said = label_features(evidence(cc, stores[1], progress=False))
    label = said.label
    assert not said.turned.any() and not said.change.isin(["amplified", "suppressed"]).any(), said.change.value_counts()
    assert (label == "shared").mean() > 0.8 and not label.isin(["A", "B"]).any(), label.value_counts()


def test_a_truth_that_is_wrong_is_noticed(table, tmp_path):
    "The scores are not flattering by construction: the same dictionary against another pair finds nothing."
    from crosscoder.model.crosscoder import load_native

    out = tmp_path / "other"
    s = Setting(geometry="near", **SMALL)
    run_methods(s, (PLAIN,), out, 5000, 5000)
    cc = load_native(next(out.glob("*/*.safetensors")))
    scores = planted_scores(Setting(geometry="near", seed=1).pair(), cc, ["shared"] * s.dict_size)
    assert scores["recovered"] < 0.05
