"Everything that can be given wrongly, and what is said: one message, exit code 2, nothing lost."

import builtins
import json
import shutil

import pytest
import torch
from conftest import WORDS, cli, make_model

from crosscoder import ActivationStore, BadInput, CrossCoder, ModelPair, TrainConfig, extract, train
from crosscoder.data.embedded import load_texts

TEXTS = [f"{w} cat sat on a {w}" for w in WORDS]
MANY = [*TEXTS, *(f"a {t}" for t in TEXTS)]


def refuses(part, f):
    with pytest.raises(BadInput) as e:
        f()
    assert part in str(e.value), str(e.value)
    return str(e.value)


@pytest.fixture
def store(pair, tmp_path):
    return extract(pair, TEXTS, tmp_path / "store", layer=2, tokens="all", shard_rows=50, progress=False)


@pytest.mark.parametrize(
    "args, part",
    [
        (["--model-a", "/no/such/model", "--model-b", "/no/such/model"], "/no/such/model"),
        (["--model-a", "A", "--model-b", "B", "--layer", 9], "0 to 3"),
        (["--model-a", "A", "--model-b", "OTHER"], "tokenizers"),
        (["--model-a", "A", "--model-b", "B", "--texts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model-a", "A", "--model-b", "B", "--texts", "FILES/fineweb.jsonl", "--column", "body"], "body"),
        (["--dict-size", 64, "--k", 65], "k is 65 and the dictionary has 64 features"),
        (["--exclusive", "0.6,0.6"], "add up to at most 1"),
        (["--test", "1.5", "--model-a", "A", "--model-b", "B", "--texts", "FILES/fineweb.jsonl"], "test is 1.5"),
        (["--preset", "nope"], "preset 'nope' is unknown"),
    ],
)
def test_command_line(args, part, models, files, tmp_path):
    other = tmp_path / "other"
    make_model(other, 2, words=["other", *WORDS[1:]])
    swap = {"A": models[0], "B": models[1], "OTHER": str(other)}
    args = [swap.get(a, str(a).replace("FILES", str(files))) for a in args]
    done = cli("diff", "--out", tmp_path / "run", "--no-wandb", *args)
    assert done.returncode == 2 and part in done.said and "Traceback" not in done.said, done.said
    assert done.said.count("crosscoder: ") == 1


def test_texts_that_fall_away_are_counted(pair, tmp_path):
    texts = ["", "   ", "cat", *TEXTS, " ".join(["the"] * 700)]
    counts = extract(pair, texts, tmp_path / "s", layer=1, tokens="all", max_tokens=100, progress=False).manifest[
        "counts"
    ]
    assert (counts["empty texts"], counts["too short texts"], counts["truncated texts"], counts["tokens cut off"]) == (
        2,
        1,
        1,
        600,
    )
    refuses(
        "no text gave an activation",
        lambda: extract(pair, ["", "cat"], tmp_path / "t", layer=1, tokens="all", progress=False),
    )


def test_missing_column(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "hello"}) + "\n")
    message = refuses("x.jsonl", lambda: list(load_texts(str(tmp_path / "x.jsonl"))))
    assert "body" in message


def test_store_of_another_kind(pair, store, models, tmp_path):
    again = lambda p=pair, **k: extract(
        p, TEXTS, store.path, **{"layer": 2, "tokens": "all", "shard_rows": 50, "progress": False, **k}
    )
    assert len(again()) == len(store)
    refuses("layer = 2, and 1 is asked", lambda: again(layer=1))
    refuses("made with tokens = 'all'", lambda: again(tokens="last"))
    refuses("made with pair.", lambda: again(ModelPair(models[1], models[1])))
    refuses("the crosscoder expects (8, 8)", lambda: train(CrossCoder((8, 8), 32, 4), store))


@pytest.mark.parametrize(
    "harm, part", [("missing", "is missing"), ("truncated", "bytes, expected"), ("altered", "was altered")]
)
def test_harmed_shard(harm, part, store):
    shard = store.path / "00001.safetensors"
    data = bytearray(shard.read_bytes())
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(data[:-1])
    else:
        data[-9] ^= 4
        shard.write_bytes(data)
    message = refuses(part, lambda: ActivationStore(store.path).read(0, len(store)))
    assert "00001.safetensors" in message


def test_nan_names_text_and_model(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    broken = AutoModelForCausalLM.from_pretrained(models[1])
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer.get_vocab()["Ġdog"]] = float("inf")
    pair = ModelPair(models[0], broken, tokenizer=tokenizer)
    message = refuses(
        "NaN or Inf",
        lambda: extract(pair, [*TEXTS, "a dog sat"], tmp_path / "s", layer=1, tokens="all", progress=False),
    )
    assert "'dog cat sat on a dog'" in message and f"model {models[1]} gave" in message
    refuses("the batch holds NaN or Inf", lambda: train(*_nan_store(tmp_path)))


def _nan_store(tmp_path):
    x = torch.randn(2, 100, 8).index_fill_(1, torch.tensor([5]), float("nan"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr("crosscoder.data.store.check_finite", lambda *args: None)  # the check that refuses such a store
        store = ActivationStore.from_tensors(tmp_path / "n", list(x))
    return CrossCoder((8, 8), 32, 4, normalizer="none"), store, TrainConfig(steps=2, batch_size=100)


def test_disk_full(pair, tmp_path, monkeypatch):
    "The third shard meets a full disk: the first two stay, and with room again the store is the same as without."
    args = dict(layer=2, tokens="all", shard_rows=50, progress=False)
    whole = extract(pair, MANY, tmp_path / "whole", **args)
    real = builtins.open

    def full(path, mode="r", *rest, **kwargs):
        return real("/dev/full" if ".00002.safetensors" in str(path) and "w" in mode else path, mode, *rest, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    message = refuses("No space left on device", lambda: extract(pair, MANY, tmp_path / "cut", **args))
    assert "00002.safetensors could not be written" in message and "make room" in message
    monkeypatch.undo()
    assert len(ActivationStore(tmp_path / "cut").manifest["shards"]) == 2
    assert not list((tmp_path / "cut").glob(".*"))
    extract(pair, MANY, tmp_path / "cut", **args)
    assert {p.name: p.read_bytes() for p in whole.path.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()
    }


def test_checkpoints_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    cc = CrossCoder((8, 8), 32, 4, activation="topk")
    cc.save(tmp_path / "own")
    cc.save(tmp_path / "card", format="card")
    path = tmp_path / "own" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "encoder_bias"}, path, metadata)
    refuses("encoder_bias is missing", lambda: CrossCoder.load(tmp_path / "own"))
    save_file({**tensors, "extra": torch.zeros(1)}, path, metadata)
    refuses("extra is not expected", lambda: CrossCoder.load(tmp_path / "own"))
    save_file({**tensors, "encoder": torch.zeros(32, 17)}, path, metadata)
    refuses("encoder has the shape (32, 17), expected (32, 16)", lambda: CrossCoder.load(tmp_path / "own"))
    state = torch.load(tmp_path / "card" / "model.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "dec_mask"}, tmp_path / "card" / "model.pt")
    refuses("dec_mask is missing", lambda: CrossCoder.load(tmp_path / "card"))


class Evil:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_pickle_is_never_run(tmp_path, capsys):
    CrossCoder((8, 8), 32, 4, activation="topk").save(tmp_path / "card", format="card")
    torch.save({"W_enc": Evil()}, tmp_path / "card" / "model.pt")
    refuses("pickle with code, which is never run", lambda: CrossCoder.load(tmp_path / "card"))
    (tmp_path / "card" / "dfc.py").write_text("print('a downloaded file was run')")
    shutil.copy(tmp_path / "card" / "dfc.py", tmp_path / "card" / "demo.py")
    refuses("never run", lambda: CrossCoder.from_pretrained(str(tmp_path / "card")))
    assert "run" not in capsys.readouterr().out


def test_unfinished_run_with_other_settings(store, tmp_path):
    from crosscoder.training.loop import Callback

    class Stop(Callback):
        def after_step(self, trainer, metrics):
            if trainer.step_number == 20:
                raise KeyboardInterrupt

    make, config = lambda: CrossCoder(store.d_in, 32, 4), TrainConfig(steps=30, batch_size=32, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(make(), store, config, out=tmp_path / "run", callbacks=[Stop()], progress=False)
    checkpoint = (tmp_path / "run/checkpoint/state.safetensors").read_bytes()
    refuses(
        "train.lr = 0.002, and 0.01 is asked",
        lambda: train(
            make(), store, TrainConfig(steps=30, batch_size=32, checkpoint_every=5, lr=0.01), out=tmp_path / "run"
        ),
    )
    assert (tmp_path / "run/checkpoint/state.safetensors").read_bytes() == checkpoint  # nothing was lost
    cc, _ = train(make(), store, config, out=tmp_path / "run", progress=False)
    alone, _ = train(make(), store, config, progress=False)
    assert all(a.equal(b) for a, b in zip(cc.state_dict().values(), alone.state_dict().values()))
