"A real Ray cluster of two nodes: a worker, a node or a driver is lost; the files are the same bits as without Ray."

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HERE

from crosscoder import ActivationStore, CrossCoder, PlantedPair, TrainConfig, train
from crosscoder.sweep.cluster import run_on_ray
from crosscoder.sweep.grid import RunSpec
from crosscoder.sweep.remote import local_store
from crosscoder.sweep.runner import run_sweep, run_sweep_on_ray
from crosscoder.training.loop import Callback

pytest.importorskip("ray", reason="Ray is an extra: pip install 'crosscoder[cluster]'")
FILES = ("config.json", "metrics.jsonl", "model.safetensors")
KS = {"k2": 2, "k3": 3, "k4": 4, "k6": 6}


class Slow(Callback):
    "Makes a step long enough to be killed in, and writes down who did it."

    def __init__(self, log, pause):
        self.log, self.pause = log, pause

    def after_step(self, trainer, metrics):
        import ray

        with open(self.log, "a") as f:
            f.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {trainer.step_number}\n")
        time.sleep(self.pause)


def one_run(job, folder):
    torch.set_num_threads(1)
    part, _ = ActivationStore(local_store(job["store"], job["cache"])).split()
    config = TrainConfig(steps=60, batch_size=200, checkpoint_every=10, log_every=5, dead_after=2000, precision="fp32")
    callbacks = [Slow(job["log"], job["pause"])] if "log" in job else []
    train(
        CrossCoder(part.d_in, 64, job["k"], (0.1, 0.1)), part, config, out=folder, callbacks=callbacks, progress=False
    )


def steps_of(log):
    "For each try at a run: its node, its process, first and last step."
    tries = {}
    for node, pid, step in map(str.split, Path(log).read_text().splitlines()):
        tries.setdefault((node, pid), []).append(int(step))
    return [(*who, steps[0], steps[-1]) for who, steps in tries.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A store, and what runs over it come to in this process without Ray."
    root = tmp_path_factory.mktemp("data")
    x, _ = PlantedPair(n_concepts=64, d=16, exclusive=(4, 4)).sample(4000)
    ActivationStore.from_tensors(root / "store", x.unbind(1))
    threads = torch.get_num_threads()
    for name, k in KS.items():
        one_run({"store": root / "store", "cache": None, "k": k}, root / "plain" / name)
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="module")
def cluster():
    "Two nodes with a CPU each. Times after which a node counts as lost are short."
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)  # workers import this module
    temp = tempfile.mkdtemp(prefix="ray-")  # short: sockets are in it
    health = {
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    }
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**small, "num_gpus": 1, "include_dashboard": False, "temp_dir": temp, "_system_config": health},
    )
    cluster.second = cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()
    shutil.rmtree(temp, ignore_errors=True)


def jobs_for(data, folder, pause=0.05, store=None):
    folder.mkdir()
    each = {"store": store or str(data / "store"), "cache": str(folder / "cache"), "pause": pause}
    return [(name, {**each, "k": k, "log": str(folder / f"{name}.log")}) for name, k in KS.items()]


def same_as_plain(data, out):
    for name in KS:
        assert sorted(p.name for p in (out / name).rglob("*")) == sorted(FILES), name
        for file in FILES:
            assert (out / name / file).read_bytes() == (data / "plain" / name / file).read_bytes(), (name, file)


class Events(list):
    "Notes events; calls `strike(pid)` once, when a run for which `chosen(name)` holds has passed step 20."

    def __init__(self, strike=None, chosen=lambda name: True):
        self.strike, self.chosen, self.pids, self.struck = strike, chosen, {}, None

    def __call__(self, name, event, info):
        self.append((name, event))
        if event in ("started", "retried"):
            self.pids[name] = info["pid"]
        if self.strike and event == "step" and 20 <= info["step"] < 50 and not self.struck and self.chosen(name):
            self.struck = name
            self.strike(self.pids[name])

    def of(self, name):
        return [event for n, event in self if n == name and event != "step"]


def test_worker_killed_and_a_run_that_fails(data, cluster, tmp_path):
    "In a plain folder. A finished sweep started again does nothing but the one that failed."
    jobs = jobs_for(data, tmp_path / "logs")
    jobs.insert(1, ("k0", {**jobs[0][1], "k": 0}))
    seen = Events(lambda pid: os.kill(pid, signal.SIGKILL))
    errors = run_on_ray(one_run, jobs, tmp_path / "out", every=0.1, on_event=seen)
    assert [name for name, error in errors.items() if error] == ["k0"]
    assert (tmp_path / "out/k0/error.txt").read_text() == errors["k0"]
    assert errors["k0"].startswith("k is 0 and the dictionary has 64 features") and "Traceback" in errors["k0"]
    assert seen.of("k0") == ["started", "failed"]
    assert seen.struck and all(seen.of(n) == ["started", *["retried"] * (n == seen.struck), "done"] for n in KS)
    (_, one, first, cut), (_, two, again, end) = steps_of(tmp_path / f"logs/{seen.struck}.log")
    assert one != two and first == 1 and 20 <= cut < 60 and 11 <= again <= cut + 1 and end == 60
    assert len({node for n in KS for node, *_ in steps_of(tmp_path / f"logs/{n}.log")}) == 2
    shutil.rmtree(tmp_path / "out/k0")
    same_as_plain(data, tmp_path / "out")

    assert not any(
        run_on_ray(one_run, [j for j in jobs if j[0] != "k0"], tmp_path / "out", address="nobody is asked").values()
    )


def test_driver_killed(data, cluster, tmp_path):
    "With `kill -9`; started again, it does only what was not done."
    jobs = jobs_for(data, tmp_path / "logs", pause=0.03)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    read_jobs = f"json.load(open({str(tmp_path / 'jobs.json')!r}))"
    where = f"{str(tmp_path / 'out')!r}, {cluster.address!r}"
    script = f"import json, test_cluster as t; t.run_on_ray(t.one_run, {read_jobs}, {where}, every=0.1)"
    driver, limit = subprocess.Popen([sys.executable, "-c", script], cwd=HERE), time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*/model.safetensors"))) < 2:
        assert driver.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    done = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/model.safetensors")}
    seen = Events()
    assert not any(run_on_ray(one_run, jobs, tmp_path / "out", every=0.1, on_event=seen).values())
    assert 2 <= len(done) < len(KS) and all(
        seen.of(name) == ["done"] and (tmp_path / "out" / name / "model.safetensors").stat().st_mtime_ns == at
        for name, at in done.items()
    )
    same_as_plain(data, tmp_path / "out")


def test_shares_of_a_gpu(cluster, tmp_path):
    "Ray hands out GPUs that it is told of; here one that need not exist, shared by two runs of half a CPU each."
    seen = lambda job, folder: (folder / "model.safetensors").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    assert run_on_ray(seen, [("a", None), ("b", None)], tmp_path / "out", cpus=0.5, gpus=0.5, every=0.1) == {
        "a": None,
        "b": None,
    }
    assert [(tmp_path / "out" / n / "model.safetensors").read_text() for n in "ab"] == ["0", "0"]


class SlowTracker(Callback):
    "What tracks a run in a sweep; this one only takes its time."

    project = None

    def __init__(self, cell, folder): ...
    def after_step(self, trainer, metrics):
        time.sleep(0.03)

    def results(self, *_): ...


def kill_one(runs, killed):
    "Kill the first worker whose run is in the middle."
    while not killed:
        for path in runs.glob("*/task.json"):
            with contextlib.suppress(FileNotFoundError):
                lease = json.loads(path.read_text())
                if not killed and lease.get("last") and 20 <= lease["last"]["step"] < 50:
                    killed.append((path.parent.name, lease["pid"])) or os.kill(lease["pid"], signal.SIGKILL)
        time.sleep(0.05)


def test_sweep_with_a_worker_killed(data, cluster, tmp_path):
    "Runs of a grid, features of one model alone and labels included: table and files are those of `run_sweep`."
    store = ActivationStore(data / "store")
    common = {
        "dict_size": 64,
        "steps": 60,
        "batch_size": 200,
        "checkpoint_every": 10,
        "log_every": 5,
        "dead_after": 2000,
    }
    kinds = {
        "plain": {"k": 3, "differences": 0},
        "found": {"k": 3, "differences": 4},
        "dfc": {"k": 4, "differences": 0, "exclusive": "0.1,0.1"},
    }
    cells = [RunSpec(name, {**common, **kind}) for name, kind in kinds.items()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each task has: the last bits of a sum depend on it
    alone = run_sweep(cells, tmp_path / "alone", store, progress=False)
    torch.set_num_threads(threads)
    killed = []
    threading.Thread(target=kill_one, args=(tmp_path / "both/runs", killed), daemon=True).start()
    table = run_sweep_on_ray(cells, tmp_path / "both", store, tracker=SlowTracker, progress=False)
    assert killed and killed[0][0] in kinds
    pd.testing.assert_frame_equal(table, alone)
    files = lambda out: {
        str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "runs").rglob("*")) if p.is_file()
    }
    assert files(tmp_path / "alone") == files(tmp_path / "both")


def test_node_gone(data, cluster, tmp_path):
    "Store and results as URLs: each node fetches the store. The second node loses its power; the first does the rest."
    node = cluster.second.node_id
    jobs = jobs_for(data, tmp_path / "logs", store=f"file://{data / 'store'}")
    on_it = lambda name: steps_of(tmp_path / f"logs/{name}.log")[0][0] == node
    seen = Events(lambda pid: cluster.remove_node(cluster.second, allow_graceful=False), on_it)
    errors = run_on_ray(one_run, jobs, f"file://{tmp_path / 'out'}", every=0.1, on_event=seen)
    assert not any(errors.values())
    assert seen.of(seen.struck) == ["started", "retried", "done"]
    (there, _, first, _), (here, _, again, end) = steps_of(tmp_path / f"logs/{seen.struck}.log")
    assert there == node != here and first == 1 and again >= 11 and end == 60
    same_as_plain(data, tmp_path / "out")
    assert len(list((tmp_path / "logs/cache/stores").glob("*/manifest.json"))) == 1
