"Publishing to a local server: create, upload, break off, resume, download again, and run what the card says."

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import cli, make_model
from hub_server import card_faults, running

from crosscoder import BadInput, CrossCoder, ModelPair
from crosscoder import cli as command_line
from crosscoder.publish.card import FILES, model_card
from crosscoder.publish.hub import check_folder, publish, write_folder

ME = {
    "hf_me": {"name": "me", "orgs": ["my-org"]},
    "hf_reader": {"name": "me", "orgs": []},
    "hf_you": {"name": "you", "orgs": []},
}
TEXT = "Use the search tool to find recent papers on RLHF"


@pytest.fixture
def hub():
    with running(users=ME, readers={"hf_reader"}) as server:
        yield server


@pytest.fixture(scope="module")
def pair_names(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return make_model(root / "a", 0, d=32, layers=3), make_model(root / "b", 1, d=32, layers=3)


@pytest.fixture(scope="module")
def run(pair_names, files, tmp_path_factory):
    "A whole small run, made by the command."
    out = tmp_path_factory.mktemp("runs") / "small"
    done = cli(
        "diff",
        "--out",
        out,
        "--model-a",
        pair_names[0],
        "--model-b",
        pair_names[1],
        "--texts",
        files / "fineweb.jsonl",
        "--texts",
        files / "toolrl.jsonl",
        "--layer",
        1,
        "--dict-size",
        128,
        "--k",
        6,
        "--exclusive",
        "0.05,0.05",
        "--steps",
        30,
        "--batch-size",
        128,
        "--no-wandb",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    "A run whose weights are over the 10 MB from which any file is a large one; nobody trained it."
    out = tmp_path_factory.mktemp("runs") / "heavy"
    cc = CrossCoder((32, 32), 20480, 8, activation="topk")
    cc.info = {"models": ["me/tuned", "me/base"], "layer": 3}
    cc.save(out)
    (out / "config.json").write_text("{}")
    return out


def env(hub, home, token="hf_me"):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    where = {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(home),
        **({"HF_TOKEN": token} if token else {}),
    }
    return {**clean, **where, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MPLBACKEND": "Agg"}


def start(hub, home, code, token="hf_me", **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env(hub, home, token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def python(hub, home, code, token="hf_me", **kwargs):
    "What a process of its own prints; HF_ENDPOINT is read when huggingface_hub is imported."
    process = start(hub, home, code, token, **kwargs)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


SAY = """
import warnings; warnings.simplefilter("ignore")
from crosscoder import BadInput, CrossCoder
from crosscoder import publish, publish_sweep
def said(f):
    try: print("done:", f())
    except BadInput as e: print("refused:", e)
"""


def test_a_run_goes_up_comes_down_and_does_what_its_card_says(run, pair_names, hub, tmp_path):
    out = python(hub, tmp_path, SAY + f"said(lambda: publish({str(run)!r}, 'me/small-dfc'))")
    assert out == f"done: {hub.url}/me/small-dfc\n"
    assert set(hub.repo("me/small-dfc")) == {*FILES, ".gitattributes"} and not hub.repos["me/small-dfc"]["private"]
    assert {f for f, (kind, _) in hub.repo("me/small-dfc").items() if kind == "lfs"} == {
        "model.pt",
        "model.safetensors",
    }

    card = hub.repo("me/small-dfc")["README.md"][1].decode()
    assert card_faults(card) == []
    numbers = json.loads((run / "evaluation.json").read_text())
    expected = (
        f"{numbers['fve_a']:#.4g}",
        f"{numbers['fve_b']:#.4g}",
        f"{numbers['l0_total']:.1f}",
        "fineweb",
        "60 texts",
        "6 A alone, 6 B alone, 116 shared",
    )
    for number in expected:
        assert number in card, number

    # the three snippets of the card that came down, unchanged but for the devices
    work = tmp_path / "reader"
    work.mkdir()
    code = """
import re, torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
ModelCard.load("me/small-dfc").validate()
card = open(hf_hub_download("me/small-dfc", "README.md")).read()
snippets = re.findall(r"^```python\\n(.*?)^```", card, re.S | re.M)
assert len(snippets) == 4
space = {}
for s in snippets:
    s = s.replace('"cuda:0"', '"cpu"').replace('"cuda:1"', '"cpu"').replace('"cuda"', '"cpu"')
    if "CrossCoder.from_pretrained" in s: space["card_features"] = space["features"]
    exec(s, space)
torch.save({k: space[k].detach() for k in ("activations", "card_features", "features", "recon")}, "found.pt")
snapshot_download("me/small-dfc", local_dir="all")
"""
    out = python(hub, tmp_path, code, token=None, cwd=work)
    assert (
        "Loaded: dict_size=128, k=6" in out
        and "Active features: " in out
        and "L0 A-excl:" in out
        and "Reconstruction MSE: " in out
    )

    found, own = torch.load(work / "found.pt", weights_only=True), CrossCoder.load(run)
    pair = ModelPair(*pair_names, device="cpu", dtype=torch.float32)
    inputs = pair.tokenizer(TEXT, return_tensors="pt")
    activations = torch.stack([a[:, -1] for a in pair.activations(inputs["input_ids"], inputs["attention_mask"], 1)], 1)
    with torch.no_grad():
        recon, features = own(activations)
    torch.testing.assert_close(found["activations"], activations, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["card_features"], features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["features"], features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["recon"], recon, atol=1e-5, rtol=0)

    # and its demo, which needs nothing of ours
    blocked = work / "blocked" / "crosscoder"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('the demo shall not need it')")
    alone = {**env(hub, tmp_path, None), "PYTHONPATH": str(work / "blocked"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "demo.py", TEXT, "--top", "128"], cwd=work / "all", env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = {int(j): float(v) for j, v in re.findall(r"feature +(\d+) \(\w+\): ([\d.]+)", done.stdout)}
    assert shown == {j: pytest.approx(v, abs=1e-3) for j, v in enumerate(features[0].tolist()) if v > 0}
    assert (work / "all/features.png").stat().st_size > 1000 and "drawn into features.png" in done.stdout


def test_an_interrupted_upload_goes_on(heavy, hub, tmp_path):
    hub.part_size = 1 << 30  # one piece a file
    first = []

    def watch(
        oid, received
    ):  # the file that comes first may finish; then, in the middle of the other, the process dies
        if not first:
            first.append(oid)
        if oid != first[0] and received > 3_000_000 and process.poll() is None:
            while first[0] not in hub.lfs:
                pass
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    hub.watch = watch
    command = SAY + f"said(lambda: publish({str(heavy)!r}, 'me/heavy'))"
    process = start(hub, tmp_path, command)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and len(hub.lfs) == 1 and hub.commits == []
    sent = None
    while sent != (sent := dict(hub.received)):
        time.sleep(0.5)  # what was on its way when it died still comes in
    size = {name: (heavy / "hub" / name).stat().st_size for name in ("model.pt", "model.safetensors")}

    assert "done:" in python(hub, tmp_path, command)
    assert hub.received[first[0]] == sent[first[0]] == len(hub.lfs[first[0]])  # what was up is not sent again
    other = next(oid for oid in hub.received if oid != first[0])
    assert hub.received[other] == sent[other] + len(hub.lfs[other]) and 3_000_000 < sent[other] < len(hub.lfs[other])
    assert sorted(map(len, hub.lfs.values())) == sorted(size.values()) and min(size.values()) > 10_000_000

    before = dict(hub.received)
    assert "done:" in python(hub, tmp_path, command)  # and a third time nothing is sent at all
    assert dict(hub.received) == before and len(hub.commits) == 1


def test_a_dropped_connection_and_many_parts(heavy, hub, tmp_path):
    "One part's connection is cut; the part alone is sent again."
    hub.cut = (None, 2_500_000)
    out = python(
        hub,
        tmp_path,
        SAY + f"said(lambda: publish({str(heavy)!r}, 'me/heavy'))\n"
        "import torch; cc = CrossCoder.from_pretrained('me/heavy'); print(cc.dict_size, cc.info['models'])",
    )
    assert "done:" in out and "20480 ['me/tuned', 'me/base']" in out
    assert hub.cut is None and len(hub.lfs) == 2
    again = sum(hub.received.values()) - sum(map(len, hub.lfs.values()))
    assert 0 < again <= hub.part_size


def test_who_may_do_what(run, hub, tmp_path):
    code = (
        SAY
        + f"run = {str(run)!r}\n"
        + """
said(lambda: publish(run, "me/secret", private=True, token="hf_me"))
said(lambda: publish(run, "me/secret"))                                  # no token
said(lambda: publish(run, "me/secret", token="hf_wrong"))
said(lambda: publish(run, "mine", token="hf_wrong"))
said(lambda: publish(run, "you/small", token="hf_me"))                   # not there, and not mine
said(lambda: publish(run, "you/small", token="hf_you"))
said(lambda: publish(run, "you/small", token="hf_me"))                   # there, and not mine
said(lambda: publish(run, "me/other", token="hf_reader"))
said(lambda: publish(run, "you/small", private=True, token="hf_you"))    # there, and public
said(lambda: publish(run, "short", token="hf_me"))
"""
    )
    out = python(hub, tmp_path, code, token=None).splitlines()
    unknown, not_mine = "refused: the hub at .* does not accept the token", "refused: this token has no right to "
    expected = [
        "done: .*/me/secret",
        "refused: there is no token to publish me/secret with: log in with `hf auth login` or set HF_TOKEN",
        unknown,
        unknown,
        not_mine + "you/small",
        "done: .*/you/small",
        not_mine + "you/small",
        not_mine + "me/other",
        "refused: you/small is there already and it is public",
        "done: .*/me/short",
    ]
    assert len(out) == len(expected), out
    for line, want in zip(out, expected):
        assert re.match(want, line), (line, want)
    assert hub.repos["me/secret"]["private"] and set(hub.repos) == {"me/secret", "you/small", "me/short"}
    assert 'repo_id = "me/short"' in hub.repo("me/short")["README.md"][1].decode()


def test_a_private_repo_without_a_token(run, hub, tmp_path):
    out = python(
        hub,
        tmp_path,
        SAY
        + f"publish({str(run)!r}, 'me/secret', private=True, token='hf_me'); "
        + "said(lambda: CrossCoder.from_pretrained('me/secret'))",
        token=None,
    )
    assert re.match(
        r"refused: me/secret is not on the hub, or it is private and there is no token: "
        r"log in with `hf auth login` or set HF_TOKEN",
        out,
    ), out
    assert out.count("\n") == 1
    assert "done: CrossCoder(32 + 32 channels" in python(
        hub, tmp_path, SAY + "said(lambda: CrossCoder.from_pretrained('me/secret'))"
    )


def test_no_network_and_a_damaged_arrival(run, hub, tmp_path):
    assert "refused: the hub at http://127.0.0.1:9 could not be reached" in python(
        "http://127.0.0.1:9", tmp_path, SAY + f"said(lambda: publish({str(run)!r}, 'me/x'))"
    )
    hub.spoil = {"dfc.py"}
    out = python(hub, tmp_path, SAY + f"said(lambda: publish({str(run)!r}, 'me/x'))")
    assert "refused: dfc.py arrived damaged in me/x: 14 bytes" in out


def test_a_sweep_becomes_a_collection(run, hub, tmp_path):
    sweep = tmp_path / "sweep"
    cells = [{"name": f"dfc-k{k}", "settings": {"k": k, "lr": 1e-3}} for k in (4, 6, 8)]
    for cell in cells[:2]:
        folder = sweep / "runs" / cell["name"]
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "evaluation.json", "features.parquet"):
            os.link(run / name, folder / name)
        (folder / "config.json").write_text(
            json.dumps(
                {
                    **json.loads((run / "config.json").read_text()),
                    "cell": cell,
                    "store": os.path.relpath(run / "activations", folder),
                }
            )
        )
    (sweep / "runs/dfc-k8").mkdir()
    (sweep / "runs/dfc-k8/error.txt").write_text("it was too much\n\nTraceback")
    (sweep / "sweep.json").write_text(json.dumps({"cells": cells}))
    code = SAY + f"said(lambda: publish_sweep({str(sweep)!r}, 'me', title='All of \"them\": <b>', private=False))\n" * 2
    out = python(hub, tmp_path, code).splitlines()
    assert (
        out[0] == "left out: dfc-k8, failed: it was too much"
        and out[1].startswith("1 of 2:")
        and out[3].startswith(f"done: {hub.url}/collections/me/all-of-them-b-")
    )
    collection = next(iter(hub.collections.values()))
    assert (
        [i["id"] for i in collection["items"]] == ["me/dfc-k4", "me/dfc-k6"]
        and collection["title"] == 'All of "them": <b>'
        and len(hub.collections) == 1
    )
    card = hub.repo("me/dfc-k4")["README.md"][1].decode()
    assert (
        "one of 3 models in a hyperparameter sweep" in card
        and f"/collections/{collection['slug']}" in card
        and "| `k` | 4 / 6 / 8 | 4 |" in card
        and "tokens read" in card
    )
    assert card_faults(card) == [] and len(hub.commits) == 2


def test_a_folder_that_lacks_a_file(run, tmp_path):
    folder = write_folder(run, tmp_path / "published", "me/small")
    (folder / "hparams.json").unlink()
    (folder / "dfc.py").write_bytes(b"")
    with pytest.raises(BadInput, match=r"lacks hparams.json, dfc.py: a published folder holds model.pt, "):
        check_folder(folder)
    with pytest.raises(BadInput, match="lacks hparams.json"):
        publish(folder, "me/small", dry_run=True)
    write_folder(run, tmp_path / "other", "me/small")
    (tmp_path / "other/hparams.json").unlink()
    done = subprocess.run([sys.executable, "demo.py"], cwd=tmp_path / "other", capture_output=True, text=True)
    assert (
        done.returncode == 1 and "hparams.json should lie beside it" in done.stderr and "Traceback" not in done.stderr
    )


def test_the_embedded_pair_says_how_to_get_it(heavy, tmp_path):
    cc = CrossCoder.load(heavy)
    cc.info = {"models": ["SmolLM2-135M-Instruct + tool-use LoRA", "SmolLM2-135M-Instruct"], "layer": 15}
    cc.save(tmp_path / "run")
    folder = write_folder(tmp_path / "run", tmp_path / "published", "me/smol")
    assert (
        "Neither model is on a hub" in (folder / "README.md").read_text()
        and "from crosscoder import default_pair" in (folder / "README.md").read_text()
    )
    done = subprocess.run([sys.executable, "demo.py"], cwd=folder, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "python demo.py --model-a a --model-b b" in done.stderr
        and "Traceback" not in done.stderr
    )


TITLES = [
    "a: b",
    "---",
    "'",
    '"',
    "- x",
    "{{ x }}",
    "\n---\nlicense: evil\n---\n",
    "<script>alert(1)</script>",
    "![x](http://e.x/a.png)",
    "| a | b |",
    "\u202e\x00\x1b[2J",
    "%s %d",
    "# h",
]


@pytest.mark.parametrize("title", TITLES)
def test_a_title_is_only_a_title(heavy, title):
    card = model_card(heavy, "me/x", title=title, author=title)
    assert card_faults(card) == []
    outside = re.sub(r"^```\w+\n.*?^```", "", card, flags=re.S | re.M)
    assert (
        len(re.findall(r"^---$", card, re.M)) == 2
        and "<script" not in outside
        and "![x](" not in outside
        and "\x1b" not in card
        and "\x00" not in card
        and "\u202e" not in card
    )
    assert len(re.findall(r"^# ", outside, re.M)) == 1


def test_disk_full(heavy, tmp_path):
    "A file that may not grow beyond 1 MB stands in for a full disk."
    code = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        + SAY
        + f"said(lambda: publish({str(heavy)!r}, 'me/x', dry_run=True))"
    )
    out = python("http://127.0.0.1:9", tmp_path, code)
    assert "refused: " in out and "could not be written" in out and "Make room" in out


@pytest.mark.skipif(not hasattr(command_line, "publish_command"), reason="the command is not there yet")
def test_the_command(run, hub, tmp_path):
    done = cli("publish", run, "--repo", "me/small", "--dry-run", env=env(hub, tmp_path, None))
    assert (
        done.returncode == 0
        and "would create the public repo me/small and upload 8 files" in done.said
        and not hub.calls
    )
    done = cli("publish", run, "--repo", "me/small", env=env(hub, tmp_path, None))
    assert done.returncode == 2 and "there is no token" in done.said and "Traceback" not in done.stderr
    done = cli(
        "publish",
        run,
        "--repo",
        "me/small",
        "--title",
        "A title",
        "--licence",
        "apache-2.0",
        "--author",
        "A. Thor",
        env=env(hub, tmp_path),
    )
    card = hub.repo("me/small")["README.md"][1].decode()
    assert (
        done.returncode == 0
        and f"{hub.url}/me/small" in done.said
        and "license: apache-2.0" in card
        and "# A title" in card
        and "author={A. Thor}" in card
    )
