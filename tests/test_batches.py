"A store larger than memory: what stays resident while it is read, a killed run resumed, what a thread leaves behind."

import json
import os
import subprocess
import sys

import pytest
import torch

from crosscoder import ActivationStore
from crosscoder.basics import BadInput
from crosscoder.data.batches import Batches

ROWS, WIDTH = 2048, 1024  # a shard of 8 MiB: two models, bf16

READ = """
import sys, torch
from crosscoder import ActivationStore
from crosscoder.data.batches import Batches
torch.set_num_threads(1)
store = ActivationStore(sys.argv[1])
batches = Batches(store, 512, buffer=2**25)
for batch in batches.stream(0, batches.per_epoch): batch[0].float().sum()
for i in range(0, len(store), 4096): store.read(i, i + 4096)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(int(status[k].split()[0]) / 1024 for k in ("RssFile", "VmHWM")))
"""

HASHES = """
import hashlib, sys, torch
from crosscoder import ActivationStore
from crosscoder.data.batches import Batches
batches = Batches(ActivationStore(sys.argv[1]), 700, seed=3, buffer=2**23)
for batch in batches.stream(int(sys.argv[2]), 45):
    print(hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in batch)).hexdigest(), flush=True)
"""


def large(path, n_shards):
    "A store of many shards, all of them hard links to the first."
    torch.manual_seed(0)
    store = ActivationStore.from_tensors(path, [torch.randn(ROWS, WIDTH).bfloat16() for _ in range(2)], shard_rows=ROWS)
    first = store.manifest["shards"][0]
    for i in range(1, n_shards):
        for end in ("safetensors", "jsonl"):
            os.link(path / f"00000.{end}", path / f"{i:05d}.{end}")
    store.manifest["shards"] = [{**first, "name": f"{i:05d}"} for i in range(n_shards)]
    (path / "manifest.json").write_text(json.dumps(store.manifest))
    return ActivationStore(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_resident_set_does_not_grow_with_the_store(tmp_path):
    "One epoch of batches and a pass in order, over 64 and over 512 MB of activations."
    sizes = {}
    for mb in (64, 512):
        store = large(tmp_path / str(mb), mb // 8)
        done = subprocess.run([sys.executable, "-c", READ, str(store.path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sizes[mb] = [float(x) for x in done.stdout.split()]
    grown = [b - a for a, b in zip(sizes[64], sizes[512])]
    assert all(g < 32 for g in grown), (
        sizes
    )  # MiB of files, and of all at the highest; both stores need two windows of 32 MiB


def test_a_part_reads_as_little(tmp_path):
    "The same rows from a part, in the precision of the store, without reading what lies between."
    store = large(tmp_path / "s", 4)
    part = store.split(0.3)[0]
    index = torch.randperm(len(part))[:300]
    for ours, theirs in zip(part.take_raw(index), store.take_raw(part.index[index])):
        assert ours.dtype == torch.bfloat16 and ours.equal(theirs)


def test_batches_after_a_kill_are_those_without(tmp_path):
    "A stream begun at any step, in another process, is the rest of the one that was killed."
    store = large(tmp_path / "s", 6)

    def hashes(start, kill_after=None):
        process = subprocess.Popen(
            [sys.executable, "-c", HASHES, str(store.path), str(start)], stdout=subprocess.PIPE, text=True
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if len(lines) == kill_after:
                process.kill()
                break
        process.wait()
        return lines

    whole, begun = hashes(0), hashes(0, kill_after=19)
    assert len(whole) == 45 and len(set(whole)) == 45
    assert begun + hashes(19) == whole


@pytest.mark.parametrize("at", [0, 5])
def test_shards_are_checked_when_they_are_first_read(at, tmp_path):
    "An altered shard raises when something of it is read, each time; the others can be read."
    path = tmp_path / "s"
    torch.manual_seed(0)
    ActivationStore.from_tensors(path, [torch.randn(600, 8), torch.randn(600, 8)], shard_rows=100)
    f = path / f"0000{at}.safetensors"
    data = bytearray(f.read_bytes())
    data[-3000] ^= 1  # of model B's activations
    f.write_bytes(data)
    store = ActivationStore(path)
    assert len(store.rows) == 600  # the table is made without them
    for _ in range(2):
        with pytest.raises(BadInput, match=f"0000{at}.safetensors was altered: its checksum is"):
            store.read(at * 100 + 3, at * 100 + 4)
    if at:
        assert len(store.read(200, 300)[0]) == 100
    with pytest.raises(BadInput, match="was altered"):
        list(Batches(store, 64).stream(0, 9))


def test_headers_that_do_not_fit(tmp_path):
    "A shard in another precision than the first is refused by name; so is a header that is no JSON."
    for name, dtype in {"a": torch.float32, "b": torch.bfloat16}.items():
        ActivationStore.from_tensors(tmp_path / name, [torch.randn(50, 4).to(dtype)], shard_rows=50)
    a, b = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in "ab")
    for end in ("safetensors", "jsonl"):
        (tmp_path / "a" / f"00001.{end}").write_bytes((tmp_path / "b" / f"00000.{end}").read_bytes())
    a["shards"].append({**b["shards"][0], "name": "00001"})
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(a))
    with pytest.raises(
        BadInput, match="00001.safetensors holds BF16 for model 0, expected torch.float32 as in the first shard"
    ):
        ActivationStore(tmp_path / "a").read(0, 100)
    f = tmp_path / "b" / "00000.safetensors"
    f.write_bytes(f.read_bytes()[:8] + b"?" + f.read_bytes()[9:])
    with pytest.raises(BadInput, match="was altered"):
        len(ActivationStore(tmp_path / "b").rows)
    with pytest.raises(BadInput, match="was altered"):
        ActivationStore(tmp_path / "b").read(0, 1)
