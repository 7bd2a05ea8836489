"""Run a stage in child processes that are killed with SIGKILL at random instants, and started again each time, until it is done.

    python killed.py extract|train OUT KILLS SEED [more]

Forks from a process that has everything imported and has computed nothing, so a start costs milliseconds.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401
from conftest import WORDS

from crosscoder import ActivationStore, CrossCoder, ModelPair, TrainConfig, extract, train

torch.set_num_threads(1)
stage, out, kills, seed, more = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]


def work():
    if stage == "extract":
        rng = random.Random(0)
        texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) for _ in range(400)]
        extract(ModelPair(*more), texts, out, layer=2, tokens="all", shard_rows=400, batch_tokens=400, progress=False)
    else:
        part, _ = ActivationStore(more[0]).split()
        cc = CrossCoder(part.d_in, 128, 4, (0.1, 0.1))
        train(cc, part, TrainConfig(steps=400, batch_size=256, checkpoint_every=20, dead_after=2000, log_every=5), out=out, progress=False)


def attempt(limit):
    "Run the stage in a child; kill it after `limit` seconds. True if it finished."
    pid = os.fork()
    if pid == 0:
        try: work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    start = time.monotonic()
    while limit is None or time.monotonic() - start < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status: sys.exit(f"the stage failed with status {status}")
            return True
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


rng, killed, seconds = random.Random(seed), 0, float(os.environ.get("WHOLE", "4"))
while killed < kills:
    if attempt(rng.uniform(0, 1.5 * seconds / kills)): break
    killed += 1
else: attempt(None)
print(f"killed {killed} times")
