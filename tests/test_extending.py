"What a format, an activation and an architecture cost who adds one: an entry of a table, in one short file."

import sys
from pathlib import Path

import pytest
import torch

TOYS = Path(__file__).parent / "toys"
sys.path.insert(0, str(TOYS))


def lines(name):
    "The lines of a toy's file that hold something."
    return [line for line in (TOYS / name).read_text().splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["toy_format.py", "toy_activation.py", "toy_architecture.py"])
def test_fifteen_lines(name):
    assert len(lines(name)) <= 15


def test_a_format(tmp_path, monkeypatch):
    import crosscoder.model.formats as formats
    from crosscoder import CrossCoder

    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    before = set(formats.FORMATS)
    import toy_format  # noqa: F401

    try:
        cc = CrossCoder((8, 8), 16, 4, activation="relu", normalizer="none")
        x = torch.randn(10, 2, 8)
        cc.save(tmp_path, format="toy")
        back = CrossCoder.load(tmp_path)
        torch.testing.assert_close(back(x)[0], cc.eval()(x)[0])
        torch.testing.assert_close(back.encode(x), cc.encode(x))
        with pytest.raises(ValueError, match="format 'tony' is unknown: one of .*toy"):
            cc.save(tmp_path, format="tony")
    finally:
        for name in set(formats.FORMATS) - before:
            del formats.FORMATS[name]


def test_an_activation(tmp_path):
    import toy_activation  # noqa: F401

    from crosscoder import ActivationStore, CrossCoder, TrainConfig, evaluate, train
    from crosscoder.data.planted import PlantedPair
    from crosscoder.model.sparse import ACTIVATIONS

    try:
        x, _ = PlantedPair(n_concepts=64, d=16, exclusive=(4, 4)).sample(4000)
        store = ActivationStore.from_tensors(tmp_path / "store", list(x.unbind(1)))
        part, held_out = store.split(test=0.1)
        cc = CrossCoder((16, 16), 64, 4, activation="every other")
        for precision in ("fp32", "bf16"):
            cc, _ = train(cc, part, TrainConfig(steps=60, precision=precision), progress=False)
        features = cc.encode(x[:100])
        assert not features[:, 1::2].any() and ((features > 0).sum(1) <= 4).all()
        numbers = evaluate(cc, held_out, progress=False)
        assert numbers["fve_a"] > 0.2 and numbers["l0_total"] <= 4
        cc.save(tmp_path / "saved")
        assert CrossCoder.load(tmp_path / "saved").encode(x[:100]).equal(features)
    finally:
        del ACTIVATIONS["every other"]


def test_an_architecture(models):
    import toy_architecture  # noqa: F401
    from transformers import AutoModelForCausalLM

    from crosscoder.basics import BadInput
    from crosscoder.data.blocks import BLOCKS, find_blocks

    model = AutoModelForCausalLM.from_pretrained(models[0])
    blocks = find_blocks(model)  # found by the search
    model.tower = torch.nn.Module()
    model.tower.floors = blocks[:2]
    model.config.model_type = "toy"
    try:
        assert len(find_blocks(model)) == 2  # named by the table
        del BLOCKS["toy"]
        assert find_blocks(model) is blocks
        model.config.num_hidden_layers = 7
        with pytest.raises(BadInput, match="found no list of 7 blocks"):
            find_blocks(model)
    finally:
        BLOCKS.pop("toy", None)
