"Inputs as people have them, files as disks leave them, folders that two want: the right value, or one line."

import copy
import json
import math
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cli

from crosscoder import ActivationStore, BadInput, CrossCoder, TrainConfig, train
from crosscoder.basics import read_tensors
from crosscoder.files import weights_fingerprint
from crosscoder.folder import LOCK, WRITER, read_metrics
from crosscoder.model.formats import FORMATS, write_tensors
from crosscoder.run.run import Run
from crosscoder.training.loop import Callback

TODAY = Path(__file__).parent / "fixtures/today"  # a run, a stopped one, a sweep and a card, as version 0.1.0 left them
CONFIG = TrainConfig(steps=12, batch_size=32, log_every=4, checkpoint_every=5)


def refused(f):
    with pytest.raises(BadInput) as e:
        f()
    return str(e.value)


def make(**settings):
    return CrossCoder((8, 8), 32, 4, **settings)


@pytest.fixture
def store(tmp_path):
    torch.manual_seed(0)
    return ActivationStore.from_tensors(tmp_path / "store", [torch.randn(300, 8), torch.randn(300, 8)])


@pytest.fixture
def today(tmp_path):
    shutil.copytree(TODAY, tmp_path / "today")
    return tmp_path / "today"


# the store knows its models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_any_change_of_weights_is_another_model(dtype):
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.arange(-60, 60).view(12, 10).to(dtype), False)})
    before = weights_fingerprint(model)
    model.w[[3, 7]] = model.w[[7, 3]].clone()  # the same numbers, two rows of them exchanged
    swapped = weights_fingerprint(model)
    model.w[[3, 7]] = model.w[[7, 3]].clone()
    assert swapped != before == weights_fingerprint(model)


def test_buffers_and_offloaded_weights_count(tmp_path):
    model = torch.nn.BatchNorm1d(4)
    before = weights_fingerprint(model)
    model.running_mean[2] = 1
    assert weights_fingerprint(model) != before
    away = torch.nn.Linear(4, 4, device="meta")
    away.config = type("Config", (), {"_name_or_path": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_fingerprint(away)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_fingerprint(away) != before


# inputs as people have them


def test_activations_in_any_form(tmp_path):
    x = torch.randn(20, 2, 4)
    forms = {
        "strided": x.numpy()[::-1],
        "frames": [pd.DataFrame(x[:, 0].numpy()), pd.DataFrame(x[:, 1].numpy())],
        "with gradients": x.clone().requires_grad_(),
        "transposed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "int64": (100 * x).long(),
    }
    for name, given in forms.items():
        read = ActivationStore.from_tensors(tmp_path / name, given).read(0, 20)
        expected = {"strided": x.flip(0), "int64": (100 * x).long().float()}.get(name, x)
        assert torch.stack(read, 1).equal(expected), name
    cc = CrossCoder((4, 4), 16, 2)
    assert cc.encode(x.numpy()).equal(cc.encode(x)) and cc.encode([x[:, 0].numpy(), x[:, 1].tolist()]).equal(
        cc.encode(x)
    )
    assert "has no" not in refused(lambda: ActivationStore.from_tensors(tmp_path / "x", torch.zeros(2, 300, 4)))


def test_numbers_of_numpy_end_as_plain_json(tmp_path, store):
    config = TrainConfig(steps=np.int32(4), batch_size=np.uint8(64), lr=np.float64(1e-3), decay=torch.tensor(0.5))
    cc = CrossCoder(np.array([8, 8]), np.int64(32), torch.tensor(4), exclusive=(np.int64(2), np.float32(0.1)))
    train(cc, store, config, out=tmp_path / "run", progress=False)
    assert (cc.n_a, cc.n_b) == (2, 3)
    found = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert found["train"]["steps"] == 4 and found["model"] | {} == {**found["model"], "d_in": [8, 8], "k": 4}
    for wrong in ({"k": 2.5}, {"k": True}, {"dict_size": -1}, {"dict_size": 10**15}, {"seed": -1}, {"seed": 2**64}):
        assert str(next(iter(wrong)).split("_")[0])[:4] in refused(lambda: CrossCoder((8, 8), **{"k": 4, **wrong}))


# nothing that is not a number


def bad_numbers(folder):
    "Every file of a folder that is JSON, read as the standard has it."
    for f in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        for text in (
            f.read_text(encoding="utf-8").splitlines() if f.suffix == ".jsonl" else [f.read_text(encoding="utf-8")]
        ):
            json.loads(text, parse_constant=lambda name: pytest.fail(f"{f} holds {name}"))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("normalizer", ["zscore", "scale", "none"])
@pytest.mark.parametrize("what", ["constant", "zero", "one row", "two rows", "silent", "huge", "tiny"])
def test_training_on_the_edge(tmp_path, what, normalizer, activation):
    x = {
        "constant": torch.full((50, 8), 0.1),
        "zero": torch.zeros(50, 8),
        "one row": torch.randn(1, 8),
        "two rows": torch.randn(2, 8),
        "huge": 1e15 * torch.randn(50, 8),
        "tiny": 1e-15 * torch.randn(50, 8),
    }.get(what, torch.randn(50, 8))
    store = ActivationStore.from_tensors(tmp_path / "store", [x, 2 * x])
    cc = make(activation=activation, normalizer=normalizer)
    if what == "silent":
        cc.encoder_bias.data.fill_(-1e6)
    try:
        cc, history = train(cc, store, CONFIG, out=tmp_path / "run", progress=False)
    except BadInput as e:
        assert "the loss of step" in str(e) and what == "huge" and normalizer == "none"
        return
    assert all(t.isfinite().all() for t in cc.state_dict().values())
    assert cc.normalizer(cc.flat([x, 2 * x])).abs().max() < 1e3 or normalizer == "none"
    bad_numbers(tmp_path / "run")
    again = CrossCoder.load(tmp_path / "run")
    assert again.encode([x, 2 * x]).isfinite().all()


FREE = {
    "activation_mean",
    "activation_std",
    "target_rms",
    "folded_scaling_factors_in_Xi",
    "folded_scaling_factors_out_Xo",
}


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.read and n != "toy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, store, name, value):
    kind = {"card": "topk", "dictionary_learning": "batchtopk", "native": "batchtopk"}.get(name, "relu")
    cc, _ = train(make(activation=kind, exclusive=(0, 0)), store, CONFIG, progress=False)
    cc.save(tmp_path / "m", name)
    file = next(f for f in (tmp_path / "m").iterdir() if f.suffix in (".pt", ".safetensors"))
    whole, tried = read_tensors(file), 0
    header = {"crosscoder": whole.pop("__crosscoder__")} if "__crosscoder__" in whole else None
    for key, t in whole.items():
        if not t.is_floating_point() or key in FREE or "mask" in key:
            continue
        harmed = t.clone().contiguous()
        harmed.view(-1)[-1] = value
        write_tensors(file, {**whole, key: harmed}, header)
        assert "NaN or Inf" in refused(lambda: CrossCoder.load(tmp_path / "m")), key
        tried += 1
    assert tried >= 4


def test_what_cannot_be_computed_is_null_with_the_reason(tmp_path, today):
    from crosscoder.folder import read_evaluation, write_evaluation
    from crosscoder.publish.card import model_card

    run = today / "run"
    text = (run / "evaluation.json").read_text(encoding="utf-8")
    numbers = json.loads(text) | {"fve_a": math.nan, "rows": 1}
    (run / "evaluation.json").write_text(json.dumps(numbers), encoding="utf-8")  # as 0.1.0 wrote it
    assert read_evaluation(run)["fve_a"] is None and "FVE not defined" in repr(Run(run))
    write_evaluation(run, numbers)
    bad_numbers(run)
    assert "there is one held-out row" in json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["why_not"]
    card = model_card(run, "me/x")
    assert "not defined" in card and "nan" not in card.lower().replace("finance", "")
    assert "fve_a" not in card and "explained-variance" in card  # B's number is there


def test_a_run_of_a_sweep_without_fve_failed_and_is_done_again(tmp_path, monkeypatch):
    import crosscoder.analysis.evaluation as evaluation
    from crosscoder.sweep.grid import read_grid
    from crosscoder.sweep.runner import run_sweep

    x = torch.randn(200, 8)
    store = ActivationStore.from_tensors(tmp_path / "store", [x, x + torch.randn(200, 8)])
    grid = {"settings": {"dict_size": 16, "steps": 4, "batch_size": 64, "differences": 0}, "axes": {"k": [2]}}
    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: real(*a, **k) | {"fve_b": None})
    table = run_sweep(read_grid(grid), tmp_path / "sweep", store, progress=False)
    assert table.state.tolist() == ["failed"] and "the FVE of model B is not defined" in table.error[0]
    bad_numbers(tmp_path / "sweep")
    monkeypatch.undo()
    assert run_sweep(read_grid(grid), tmp_path / "sweep", store, progress=False).state.tolist() == ["done"]


# other machines, other processes


def _encode(cc, x, queue):
    queue.put(cc.encode(x).detach().numpy())


def test_copies_in_other_processes(store):
    cc, _ = train(make(), store, CONFIG, progress=False)
    x = torch.randn(5, 2, 8)
    for other in (pickle.loads(pickle.dumps(cc)), copy.deepcopy(cc)):
        assert other.encode(x).equal(cc.encode(x))
        other.load_state_dict(cc.state_dict())  # its hook is there too
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_encode, args=(cc, x, queue))
    process.start()
    assert torch.from_numpy(queue.get(timeout=60)).equal(cc.encode(x).detach())
    process.join()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_another_default_dtype_changes_no_bit(store, dtype):
    usual, _ = train(make(exclusive=(2, 2)), store, CONFIG, progress=False)
    torch.set_default_dtype(dtype)
    try:
        other, _ = train(make(exclusive=(2, 2)), store, CONFIG, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        a.equal(b) and a.dtype == b.dtype for a, b in zip(usual.state_dict().values(), other.state_dict().values())
    )


def test_autocast_changes_no_bit(store):
    x = torch.stack(store.read(0, 300), 1)
    usual, _ = train(make(), store, CONFIG, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, _ = train(make(), store, CONFIG, progress=False)
        recon, features = other(x)
        decoded = other.decode(features)
    assert usual(x)[0].equal(recon) and usual(x)[1].equal(features)
    assert torch.allclose(usual.decode(features), decoded, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.read and n != "toy"])
def test_names_of_compiled_modules(tmp_path, store, name):
    kind = {"card": "topk", "dictionary_learning": "batchtopk", "native": "batchtopk"}.get(name, "relu")
    cc, _ = train(make(activation=kind), store, CONFIG, progress=False)
    cc.save(tmp_path / "m", name)
    before = CrossCoder.load(tmp_path / "m")
    file = next(f for f in (tmp_path / "m").iterdir() if f.suffix in (".pt", ".safetensors"))
    tensors = read_tensors(file)
    header = {"crosscoder": tensors.pop("__crosscoder__")} if "__crosscoder__" in tensors else None
    write_tensors(file, {f"_orig_mod.{k}": v for k, v in tensors.items()}, header)
    assert CrossCoder.load(tmp_path / "m").encoder.equal(before.encoder)


def test_no_home(monkeypatch):
    from crosscoder.basics import cache_dir

    monkeypatch.delenv("CROSSCODER_CACHE", raising=False)
    monkeypatch.setattr(
        Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("Could not determine home"))
    )
    assert "set CROSSCODER_CACHE" in refused(cache_dir)


def test_devices_that_are_not_there(today):
    for device in ("cuda:77", "mps:9", "gpu"):
        assert "there is no device" in refused(lambda: CrossCoder.load(today / "run", device))
    done = cli("diff", "--out", today / "new", "--device", "cuda:77", "--no-wandb")
    assert done.returncode == 2 and "there is no device 'cuda:77' here" in done.said and not (today / "new").exists()


@pytest.mark.parametrize("variable", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_tracking_that_is_disabled_leaves_nothing(tmp_path, store, monkeypatch, variable):
    from crosscoder.training.tracking import WandB

    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = WandB("p", tmp_path / "run")
        train(make(), store, CONFIG, out=tmp_path / "run", callbacks=[tracker], progress=False)
        tracker.results({"fve_a": 1.0, "fve_b": None})
    assert not (tmp_path / "run/wandb").exists()


# one writer a folder


HOLD = """
import sys, time
from crosscoder.folder import one_writer
with one_writer(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    "A folder that another process writes into."
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "held")], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    yield tmp_path / "held", other
    other.kill()
    other.wait()


def test_a_folder_that_another_process_has(held, store):
    folder, other = held
    for call in (
        lambda: train(make(), store, CONFIG, out=folder, progress=False),
        lambda: ActivationStore.from_tensors(folder, [torch.zeros(3, 2), torch.zeros(3, 2)]),
    ):
        assert f"process {other.pid} on " in refused(call)
    done = cli("evaluate", "--out", folder)
    assert done.returncode == 2 and f"process {other.pid} on" in done.said and "since" in done.said
    assert {p.name for p in folder.iterdir()} == {LOCK, WRITER}  # nothing was written, nothing removed
    other.kill()
    other.wait()
    train(make(), store, CONFIG, out=folder, progress=False)  # a dead one has nothing
    assert not {LOCK, WRITER} & {p.name for p in folder.iterdir()}


def test_a_failed_run_gives_its_folder_back(tmp_path, store):
    class Fail(Callback):
        def after_step(self, trainer, metrics):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(make(), store, CONFIG, out=tmp_path / "run", callbacks=[Fail()], progress=False)
    assert not (tmp_path / "run" / LOCK).exists()


def test_one_manifest_two_writers(tmp_path):
    from crosscoder.data.shards import StoreWriter

    empty = {
        "format": 1,
        "d_in": [2, 2],
        "settings": {"from": "tensors"},
        "shards": [],
        "counts": {},
        "complete": False,
    }
    ActivationStore.from_tensors(tmp_path / "s", [torch.zeros(3, 2), torch.zeros(3, 2)])
    whole = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    StoreWriter(tmp_path / "s", dict(empty))  # nothing of it known, nothing of it claimed
    shards = ActivationStore(tmp_path / "s").manifest["shards"]
    stale = {**empty, "shards": [{**shards[0], "rows": 2}]}
    assert "another process has written into" in refused(lambda: StoreWriter(tmp_path / "s", stale))
    assert whole == {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_folder_of_something_else_stays_as_it_is(tmp_path, store, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text('{"model_type": "qwen2"}')
    assert "is not a run" in refused(lambda: train(make(), store, CONFIG, out=mine, progress=False))
    for command in ("diff", "train", "extract"):
        done = cli(command, "--out", mine)
        assert done.returncode == 2 and "Nothing was changed" in done.said, done.said
    assert [p.name for p in mine.iterdir()] == [name] and (mine / name).read_text() == '{"model_type": "qwen2"}'


def test_only_our_own_files_are_removed(tmp_path, store):
    theirs = tmp_path / "run/checkpoint/notes.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    train(make(), store, CONFIG, out=tmp_path / "run", progress=False)
    assert theirs.read_text() == "mine" and [p.name for p in theirs.parent.iterdir()] == ["notes.txt"]


# declared sizes


def bombs(root):
    "What is small on disk and declares to be large, by name: what to call."
    import zipfile

    from crosscoder.basics import parse_json, parse_yaml
    from crosscoder.folder import load_table
    from crosscoder.sweep.grid import read_grid

    torch.save({"W_enc": torch.zeros(1).expand(10**6, 10**6)}, root / "expanded.pt")
    with zipfile.ZipFile(root / "zip.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", b"")
        with z.open("x/data/0", "w", force_zip64=True) as f:
            for _ in range(2**10):
                f.write(bytes(2**20))
    make().save(root / "native")
    tensors = read_tensors(root / "native/model.safetensors")
    header = json.loads(tensors.pop("__crosscoder__"))
    header["config"] |= {"dict_size": 10**9}
    write_tensors(root / "declared/model.safetensors", tensors, {"crosscoder": json.dumps(header)})
    make(activation="topk").save(root / "card", format="card")
    card = json.loads((root / "card/config.json").read_text())
    (root / "card/config.json").write_text(json.dumps(card | {"dict_size": 10**10}))
    pd.DataFrame({f"c{i}": np.zeros(5_000_000, np.int8) for i in range(40)}).to_parquet(root / "rows.parquet")
    ActivationStore.from_tensors(root / "store", [torch.zeros(3, 2), torch.zeros(3, 2)])
    manifest = json.loads((root / "store/manifest.json").read_text())
    manifest["d_in"] = [10**9, 10**9]
    (root / "store/manifest.json").write_text(json.dumps(manifest))
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
    )
    axes = {"axes": {k: list(range(1, 1001)) for k in ("k", "steps", "seed", "init_seed")}}
    name = {"name": "{k:1000000000}", "axes": {"k": [1]}}
    return {
        "expanded": lambda: CrossCoder.load(root / "expanded.pt"),
        "zip": lambda: CrossCoder.load(root / "zip.pt"),
        "declared": lambda: CrossCoder.load(root / "declared"),
        "card": lambda: CrossCoder.load(root / "card"),
        "parquet": lambda: load_table(root / "rows.parquet"),
        "manifest": lambda: ActivationStore(root / "store"),
        "laughs": lambda: parse_yaml(laughs, "x.yaml"),
        "deep yaml": lambda: parse_yaml("[" * 50_000, "x.yaml"),
        "deep json": lambda: parse_json("[" * 10**6, "x.json"),
        "long int": lambda: parse_json("1" * 10**6, "x.json"),
        "grid": lambda: read_grid(axes),
        "name": lambda: read_grid(name),
        "attribute": lambda: read_grid({"name": "{k.__class__}", "axes": {"k": [1]}}),
        "settings": lambda: CrossCoder((4096, 4096), 2**40),
    }


def test_what_declares_more_than_it_has(tmp_path):
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_faults import bombs
from crosscoder import BadInput
calls = bombs(Path({str(tmp_path)!r}))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for name, call in calls.items():
    start, before = time.time(), peak()
    try:
        call()
        print(name, "was taken")
    except BadInput as e:
        print(name, "refused", round(time.time() - start, 2), round(peak() - before), str(e)[:150].replace("\\n", " "))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 14 and "was taken" not in done.stdout, done.stdout + done.stderr[-2000:]
    for line in done.stdout.splitlines():
        seconds, megabytes = line.split(" refused ")[1].split()[:2]
        assert float(seconds) < 2 and int(megabytes) < 300, line


# files as disks leave them


STRANGE = [None, [], {}, "x", -1, 10**400, 1.5, True, [[[]]], "\x1b[31m"]


def places(value, at=()):
    "Every place in a piece of JSON."
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def put(value, at, strange):
    if not at:
        return strange
    new = copy.copy(value)
    new[at[0]] = put(value[at[0]], at[1:], strange)
    return new


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "texts.json", "activations/manifest.json"])
def test_strange_values_are_explained_or_do_no_harm(today, name):
    path = today / "run" / name
    content = json.loads(path.read_text(encoding="utf-8"))
    tried = 0
    for at in places(content):
        for strange in STRANGE[:: 1 if len(at) < 3 else 3]:
            path.write_text(json.dumps(put(content, at, strange)), encoding="utf-8")
            run = Run(today / "run")
            for read in (
                lambda: run.config,
                lambda: run.evaluation,
                lambda: run.text_counts,
                lambda: run.parts(),
                lambda: repr(run),
            ):
                try:
                    read()
                except BadInput as e:
                    assert "\x1b" not in str(e)
            tried += 1
    assert tried > 20


def test_metrics_with_a_cut_and_a_damaged_line(today):
    path = today / "run/metrics.jsonl"
    whole = path.read_bytes()
    n = len(read_metrics(today / "run"))
    for cut in range(1, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        with pytest.warns(UserWarning, match="was cut off and is left out"):
            assert len(read_metrics(today / "run")) == n - 1 or cut == 1
    path.write_bytes(whole + bytes(50) + b"\n")  # a disk that lost power
    with pytest.warns(UserWarning, match="was cut off"):
        assert len(read_metrics(today / "run")) == n
    path.write_bytes(b'{"step": "one"}\n' + whole)
    assert "line 1 of" in refused(lambda: read_metrics(today / "run"))


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_a_bit_of_a_model_and_of_a_checkpoint(tmp_path, today, store, at):
    cc, _ = train(make(), store, CONFIG, out=tmp_path / "new", progress=False)
    model = tmp_path / "new/model.safetensors"
    data = bytearray(model.read_bytes())
    data[int(at * len(data))] ^= 1
    model.write_bytes(data)
    message = refused(lambda: CrossCoder.load(tmp_path / "new"))
    assert "was altered" in message or "not a whole" in message or "is damaged" in message


# upgrades


def test_files_of_today_open_for_good(today):
    run = Run(today / "run")
    assert run.parts()[0].d_in == (8, 8) and len(run.features) == 24 and run.changes is not None
    assert run.evaluation["fve_a"] == pytest.approx(json.loads((TODAY / "run/evaluation.json").read_text())["fve_a"])
    x = run.parts()[1].read(0, 9)
    card = CrossCoder.load(today / "card")
    assert torch.allclose(run.crosscoder().codes(x).dense(), card.codes(x).dense(), atol=1e-4)
    from crosscoder.sweep.effects import sweep_table

    table = sweep_table(today / "sweep").set_index("name")
    assert table.state["k2"] == "done" and table.state["k3"] == "waiting"


def test_a_run_that_was_stopped_before_the_upgrade_goes_on(today):
    part = Run(today / "run").parts()[0]
    config = TrainConfig(steps=12, batch_size=64, log_every=4, checkpoint_every=5)
    config.precision = json.loads((today / "stopped/config.json").read_text())["train"]["precision"]
    cc, history = train(CrossCoder((8, 8), 24, 4), part, config, out=today / "stopped", progress=False)
    assert history.step.tolist() == [1, 4, 8, 12] and not (today / "stopped/checkpoint").exists()


def test_newer_files_are_refused_by_their_number(today):
    for path, read in {
        today / "run/config.json": lambda: Run(today / "run").config,
        today / "run/activations/manifest.json": lambda: ActivationStore(today / "run/activations"),
    }.items():
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format": 9}), encoding="utf-8")
        message = refused(read)
        assert "is of format 9, and this version of crosscoder reads up to 1: update crosscoder" in message
    model = today / "run/model.safetensors"
    tensors = read_tensors(model)
    header = json.loads(tensors.pop("__crosscoder__")) | {"format": 9}
    write_tensors(model, tensors, {"crosscoder": json.dumps(header)})
    assert "is of format 9" in refused(lambda: CrossCoder.load(model))
