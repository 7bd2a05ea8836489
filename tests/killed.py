"""Run a stage in child processes that are killed with SIGKILL at random instants, and started again until it is done.

    python killed.py extract|train OUT KILLS SEED [more]

Forks from a process that has everything imported and the models loaded, and has computed nothing, so a start costs
milliseconds. Prints how often it killed, how many of the kills came when something, but not all, was on disk, and how
long a start takes that finds nothing to do, and how long the last one before it took.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401
from conftest import WORDS

from crosscoder import ActivationStore, CrossCoder, ModelPair, TrainConfig, extract, find_differences, train

torch.set_num_threads(1)
stage, out, kills, seed, more = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
pair = ModelPair(*more) if stage == "extract" else None


def work():
    if stage == "extract":
        rng = random.Random(0)
        texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) for _ in range(400)]
        extract(pair, texts, out, layer=2, tokens="all", shard_rows=200, batch_tokens=64, progress=False)
    else:
        part, _ = ActivationStore(more[0]).split()
        cc = CrossCoder(part.d_in, 128, 4, (0.1, 0.1))
        config = TrainConfig(steps=400, batch_size=256, checkpoint_every=20, dead_after=2000, log_every=5)
        find_differences(cc, part, config, out=Path(out) / "difference", progress=False)
        train(cc, part, config, out=out, progress=False)


def attempt(limit):
    "Run the stage in a child; kill it after `limit` seconds. True if it finished."
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    start = time.monotonic()
    while limit is None or time.monotonic() - start < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                sys.exit(f"the stage failed with status {status}")
            return True
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def halfway():
    "Is a part of the result on disk?"
    if stage == "train":
        return any(
            (out / f).exists()
            for f in (
                "checkpoint/state.safetensors",
                "difference/checkpoint/state.safetensors",
                "difference/model.safetensors",
            )
        )
    manifest = out / "manifest.json"
    return manifest.exists() and not json.loads(manifest.read_text())["complete"]


def clock():
    "Seconds that a start takes which is left alone."
    start = time.monotonic()
    attempt(None)
    return time.monotonic() - start


rng = random.Random(seed)
killed, mid = 0, 0
# of a start that finds nothing to do, and of one that does everything
setup, whole = map(float, os.environ.get("SECONDS", "0 0").split())
while killed < kills:
    in_the_work = killed % 2  # otherwise while it starts
    limit = setup + rng.uniform(0, 3 * (whole - setup) / kills) if in_the_work else rng.uniform(0, setup)
    if attempt(limit):
        break
    killed += 1
    mid += halfway()
whole = clock()
print(f"killed {killed} times, {mid} of them halfway; {clock():.3f} {whole:.3f}")
