"""Weights & Biases against a server of our own, which speaks its protocol as far as runs, artifacts and sweeps need it:
real kills, `wandb sync`, an agent."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import HERE
from matplotlib.figure import Figure

from crosscoder import ActivationStore, CrossCoder, PlantedPair, TrainConfig, evaluate, train
from crosscoder.basics import BadInput
from crosscoder.training.loop import train_many
from crosscoder.training.tracking import WandB, agent, definition, offline_files, read_offline

wandb = pytest.importorskip("wandb")
OWNER = {"id": "owner", "name": "someone"}


class Server(ThreadingHTTPServer):
    "Remembers what W&B's client sends, and hands out the trials of a sweep."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs, self.files, self.artifacts, self.sweeps, self.trials, self.unknown = {}, {}, [], [], [], []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def run(self, name):
        return self.runs.setdefault(name, {"lines": [], "config": {}, "exit": [], "started": False})

    def stream(self, name, sent):
        "What a running run sends: lines of history behind what is there, and how it ended."
        run = self.run(name)
        if history := sent.get("files", {}).get("wandb-history.jsonl"):
            assert history["offset"] == len(run["lines"])
            run["lines"] += [json.loads(line) for line in history["content"]]
        if summary := sent.get("files", {}).get("wandb-summary.json"):
            run["summary"] = json.loads(summary["content"][-1])
        if sent.get("complete"):
            run["exit"].append(sent["exitcode"])

    def answer(self, operation, v):
        "GraphQL's answer to one operation with variables `v`."
        if operation == "UpsertBucket":
            run = self.run(v["name"])
            for ours, theirs in {
                "group": "groupName",
                "name": "displayName",
                "project": "project",
                "sweep": "sweep",
            }.items():
                if v.get(theirs):
                    run[ours] = v[theirs]
            run["config"] |= {k: c["value"] for k, c in json.loads(v.get("config") or "{}").items()}
            run["started"] = True
            bucket = {
                "id": f"id-{v['name']}",
                "name": v["name"],
                "displayName": run.get("name"),
                "config": v.get("config"),
                "sweepName": run.get("sweep"),
                "project": {"id": "project", "name": v.get("project"), "entity": OWNER},
                "historyLineCount": len(run["lines"]),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": False}}
        if operation == "RunResumeStatus":
            run = self.run(v["name"])
            if not run["started"]:
                return {"model": {"id": "project", "name": v["project"], "entity": OWNER, "bucket": None}}
            bucket = {
                "id": f"id-{v['name']}",
                "name": v["name"],
                "displayName": run.get("name"),
                "summaryMetrics": json.dumps(run.get("summary", {})),
                "logLineCount": 0,
                "historyLineCount": len(run["lines"]),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(line) for line in run["lines"][-1:]]),
                "eventsTail": "[]",
                "config": json.dumps({k: {"value": c} for k, c in run["config"].items()}),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": {}}),
            }
            return {"model": {"id": "project", "name": v["project"], "entity": OWNER, "bucket": bucket}}
        if operation == "CreateRunFiles":
            return {
                "createRunFiles": {
                    "runID": f"id-{v['run']}",
                    "uploadHeaders": [],
                    "files": [{"name": f, "uploadUrl": f"{self.url}/put/{v['run']}/{f}"} for f in v["files"]],
                }
            }
        if operation == "CreateArtifact":
            self.artifacts.append(v["input"])
            return {
                "createArtifact": {
                    "artifact": {"id": "artifact", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
                }
            }
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            file = {"id": "file", "uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": {"id": "manifest", "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": f["name"],
                    "uploadUrl": f"{self.url}/put/artifact/{f['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": "artifact"},
                }
                for f in v["input"]["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}
        if operation == "UpsertSweep":
            self.sweeps.append(json.loads(v["config"]) if v["config"].startswith("{") else v["config"])
            return {
                "upsertSweep": {
                    "sweep": {"name": "sweep1", "project": {"id": "project", "name": "sweeps", "entity": OWNER}},
                    "configValidationWarnings": [],
                }
            }
        if operation == "CreateAgent":
            if v["sweep"] != "sweep1":
                return None
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands = [] if "true" in v["runState"] else [self.trials.pop(0) if self.trials else {"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "iewer" in operation or operation == "ServerInfo":
            return {
                "viewer": {
                    "id": "viewer",
                    "entity": "someone",
                    "username": "someone",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                },
                "serverInfo": None,
            }
        self.unknown.append(operation)
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def reply(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while n := int(self.rfile.readline(), 16):
                data += self.rfile.read(n + 2)[:-2]
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_PUT(self):
        self.server.files[self.path.removeprefix("/put/")] = self.body()
        self.reply({})

    def do_POST(self):
        body = self.body()
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])
            try:
                data = self.server.answer(operation[1] if operation else asked["query"], asked.get("variables") or {})
            except Exception as e:  # W&B would ask again and again
                self.server.unknown.append(f"{operation[1]}: {e!r}")
                data = None
            return self.reply({"data": data} if data else {"data": None, "errors": [{"message": "not found"}]})
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.stream(stream[1], json.loads(body))
        self.reply({"limits": {}})


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "BASE_URL": server.url,
        "API_KEY": "a" * 40,
        "CONFIG_DIR": tmp_path / "config",
        "CACHE_DIR": tmp_path / "cache",
        "DATA_DIR": tmp_path / "data",
        "SILENT": "true",
        "ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    wandb.teardown()  # W&B reads its settings once a process
    monkeypatch.setattr(WandB, "offline", False)
    monkeypatch.setattr(WandB, "warned", False)
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    x, _ = PlantedPair(n_concepts=64, d=16, exclusive=(4, 4)).sample(6000)
    return ActivationStore.from_tensors(tmp_path_factory.mktemp("data") / "store", x.unbind(1)).split(test=0.2)


def fresh(**kwargs):
    return CrossCoder((16, 16), **{"dict_size": 64, "k": 2, **kwargs})


SHORT = TrainConfig(steps=60, batch_size=256, checkpoint_every=20, dead_after=2000)

# trains in a process of its own and kills itself, and W&B's process with it or not, in the step that is given
SCRIPT = """
import os, signal, sys
from pathlib import Path
import psutil
import torch
from crosscoder import ActivationStore, CrossCoder, TrainConfig, train
from crosscoder.training.tracking import WandB
from crosscoder.training.loop import Callback

torch.set_num_threads(1)
store, out, at, everything = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "all"

class Kill(Callback):
    def after_step(self, trainer, metrics):
        if trainer.step_number != at: return
        for p in psutil.Process().children(recursive=True) if everything else []: p.kill()
        os.kill(os.getpid(), signal.SIGKILL)

part, _ = ActivationStore(store).split(test=0.2)
config = TrainConfig(steps=240, batch_size=64, checkpoint_every=50, log_every=1, dead_after=2000)
cc = CrossCoder((16, 16), dict_size=64, k=2)
train(cc, part, config, out=out, callbacks=[WandB("project", out, group="group"), Kill()], progress=False)
"""


def killed_at(step, parts, out, everything):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(parts[0].store.path), str(out), str(step), everything],
        cwd=HERE,
        capture_output=True,
        text=True,
    )


def curves(out, found):
    "What was logged are the lines of metrics.jsonl, each once and in order."
    kept = pd.read_json(out / "metrics.jsonl", lines=True).rename(columns={"step": "_step"})
    found = pd.DataFrame(found)[kept.columns].dropna(subset="loss").reset_index(drop=True)
    assert found._step.tolist() == kept._step.tolist()
    pd.testing.assert_frame_equal(found, kept, check_dtype=False, rtol=1e-9)


def test_killed_offline_and_synced(server, parts, tmp_path, monkeypatch):
    "A run that is killed twice and goes on is one run with each step once, also to `wandb sync`."
    out = tmp_path / "name"
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step, everything in {130: "python", 220: "all"}.items():
        assert killed_at(step, parts, out, everything).returncode == -9
        last = offline_files(out)[-1]
        os.truncate(last, last.stat().st_size - 5)  # whether W&B had just written a whole record is chance
    done = killed_at(0, parts, out, "nothing")
    assert done.returncode == 0, done.stderr
    assert len(offline_files(out)) == 3
    found = read_offline(out)
    curves(out, found["history"])
    evaluation = evaluate(CrossCoder.load(out), parts[1], progress=False)
    monkeypatch.chdir(tmp_path)
    WandB("project", "name", group="group").results(evaluation)
    monkeypatch.chdir(HERE)

    monkeypatch.delenv("WANDB_MODE")
    said = subprocess.run([sys.executable, "-m", "wandb", "sync", str(out / "wandb")], capture_output=True, text=True)
    assert said.returncode == 0 and "ERROR" not in said.stderr, said.stderr
    ((id, run),) = server.runs.items()
    curves(out, run["lines"])
    assert (id, run["project"], run["group"], run["name"], run["exit"]) == (
        found["id"],
        "project",
        "group",
        "name",
        [1, 1, 0, 0],
    )
    assert {k: run["config"][k] for k in ("format", "model", "train", "data")} == json.loads(
        (out / "config.json").read_text()
    )
    assert run["summary"]["heldout/fve_a"] == evaluation["fve_a"]
    assert server.files["artifact/model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert json.loads(server.files["artifact/config.json"]) == json.loads((out / "config.json").read_text())
    assert not server.unknown or set(server.unknown) <= {
        "OrganizationCoreWeaveOrganizationID",
        "ServerFeaturesQuery",
    }, server.unknown


def test_killed_online(server, parts, tmp_path):
    "Online, the server says how far it got."
    out = tmp_path / "name"
    assert killed_at(130, parts, out, "all").returncode == -9
    (run,) = server.runs.values()
    reached = run["lines"][-1]["_step"] if run["lines"] else 0
    done = killed_at(0, parts, out, "all")
    assert done.returncode == 0, done.stderr
    figure = Figure()
    figure.subplots().plot([1, 2])
    WandB("project", out, group="group").results(
        evaluate(CrossCoder.load(out), parts[1], progress=False), figures={"line": figure}
    )
    ((id, run),) = server.runs.items()
    assert run["lines"][-1]["_step"] == 241
    assert server.files[f"{id}/{run['lines'][-1]['figures/line']['path']}"].startswith(b"\x89PNG")
    curves(out, run["lines"])
    assert reached <= 130 and run["exit"][-1] == 0 and 0 < run["summary"]["fve"] < 1
    assert server.files["artifact/model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_many_at_once(server, parts, tmp_path, monkeypatch):
    "Dozens of runs in one process, each its own."
    monkeypatch.setenv("WANDB_MODE", "offline")
    ks = [1 + i % 8 for i in range(16)]
    outs = [tmp_path / f"run{i}" for i in range(16)]
    for out, k in zip(outs, ks):
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"cell": {"name": out.name, "settings": {"k": k}}}))
    train_many(
        [fresh(k=k) for k in ks],
        parts[0],
        SHORT,
        outs,
        [[WandB("project", out, group="sweep")] for out in outs],
        progress=False,
    )
    found = [read_offline(out) for out in outs]
    for out, f in zip(outs, found):
        curves(out, f["history"])
    assert [(f["project"], f["group"], f["name"], f["config"]["k"], f["config"]["model"]["k"]) for f in found] == [
        ("project", "sweep", o.name, k, k) for o, k in zip(outs, ks)
    ]
    assert len({f["id"] for f in found}) == 16


def test_server_that_is_away(server, parts, tmp_path, monkeypatch):
    "One warning, and the runs are written offline."
    server.shutdown()
    server.server_close()
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("one", "two"):
            train(
                fresh(),
                parts[0],
                SHORT,
                out=tmp_path / name,
                callbacks=[WandB("project", tmp_path / name)],
                progress=False,
            )
            curves(tmp_path / name, read_offline(tmp_path / name)["history"])
    said = [str(w.message) for w in caught if "Weights & Biases" in str(w.message)]
    assert len(said) == 1 and "written offline; `wandb sync` uploads them later" in said[0]


@pytest.fixture
def fast(monkeypatch):
    from wandb.agents.pyagent import Agent

    monkeypatch.setattr(Agent, "HEARTBEAT_SLEEP_SECONDS", 0.1)


def trial(name, **settings):
    return {"type": "run", "run_id": name, "args": {k: {"value": v} for k, v in settings.items()}}


def test_agent(server, fast, parts, tmp_path, monkeypatch):
    "A sweep made of a grid hands out trials; each logs into its own run, a failed one is marked, the agent goes on."
    server.trials = [trial("t1", k=2), trial("t2", kk=3), trial("t3", k=3), trial("t4", k=200)]

    def run(name, settings):
        out = tmp_path / "runs" / name
        cc, _ = train(
            fresh(**settings),
            parts[0],
            SHORT,
            out=out,
            callbacks=[WandB("ignored", out, group="group")],
            progress=False,
        )
        WandB("ignored", out, group="group").results(evaluate(cc, parts[1], progress=False))

    ours = lambda: {n: v for n, v in os.environ.items() if n.startswith("WANDB_") and n != "WANDB_SERVICE"}
    before = ours()
    outcome = agent(
        definition({"k": [2, 3]}, "grid"), run, tmp_path / "w", project="sweeps", known=["k", "lr"]
    )  # until it says that the sweep is over
    assert ours() == before
    assert outcome["t1"] is None and outcome["t3"] is None
    assert outcome["t2"] == "the W&B sweep sets kk: no such field. Known are k, lr"
    assert "k is 200 and the dictionary has 64" in outcome["t4"]
    assert "values" in str(server.sweeps[0]) and "maximize" in str(server.sweeps[0])
    assert sorted(server.runs) == ["t1", "t2", "t3", "t4"]
    for name, k in {"t1": 2, "t3": 3}.items():
        done = server.runs[name]
        curves(tmp_path / "runs" / name, done["lines"])
        assert (done["config"]["k"], done["config"]["model"]["k"], set(done["exit"]), done["sweep"]) == (
            k,
            k,
            {0},
            "sweep1",
        )
        assert 0 < done["summary"]["fve"] < 1
    for name in ("t2", "t4"):
        assert server.runs[name]["exit"] == [1] and server.runs[name]["summary"]["error"] == outcome[name]


def test_the_command_serves_a_sweep(server, fast, tmp_path):
    "`crosscoder sweep --wandb-agent new` makes a grid's W&B sweep; a cell that is done already still fills its trial."
    from typer.testing import CliRunner

    from crosscoder.cli import app

    x, _ = PlantedPair(n_concepts=64, d=16, exclusive=(4, 4)).sample(4000)
    ActivationStore.from_tensors(tmp_path / "store", x.unbind(1))
    server.trials = [trial("t1", cell="k2"), trial("t2", k=4), trial("t3", cell="k2"), trial("t4", cell="k9")]
    options = [
        "--axis",
        "k=2 3",
        "--dict-size",
        64,
        "--steps",
        30,
        "--batch-size",
        200,
        "--differences",
        0,
        "--out",
        tmp_path / "s",
        "--store",
        tmp_path / "store",
    ]
    done = CliRunner().invoke(app, ["sweep", *map(str, options), "--wandb-agent", "new", "--project", "sweeps"])
    assert done.exit_code == 0 and "4 trials, 1 of them failed" in done.output, done.output
    assert "k2" in str(server.sweeps[0]) and "k3" in str(server.sweeps[0])
    assert sorted(p.name for p in (tmp_path / "s/runs").iterdir()) == ["k2", "trial-t2"]
    found = {n: r["summary"].get("fve") for n, r in server.runs.items()}
    assert 0 < found["t1"] < found["t2"] < 1 and found["t3"] == found["t1"]
    curves(tmp_path / "s/runs/k2", server.runs["t1"]["lines"])
    assert "asks for the cell 'k9', and the grid has k2, k3" in server.runs["t4"]["summary"]["error"]


def test_agent_serves_no_more_than_it_should(server, fast, tmp_path):
    server.trials, seen = [trial("t1", k=2), trial("t2", k=3)], []
    assert agent("someone/sweeps/sweep1", lambda name, settings: seen.append((name, settings)), tmp_path, count=1) == {
        "t1": None
    }
    assert seen == [("t1", {"k": 2})]


def test_sweep_that_is_not_there(server, tmp_path):
    with pytest.raises(BadInput, match="the W&B sweep 'nowhere' cannot be served"):
        agent("nowhere", print, tmp_path, project="sweeps")


def test_wrong_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(BadInput, match="WANDB_API_KEY invalid.*has 5"):
        agent("sweep1", print, tmp_path, project="sweeps")


def test_no_login(server, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(BadInput, match="nobody is logged in: run `wandb login`"):
        agent("sweep1", print, tmp_path, project="sweeps")


def test_wandb_accepts_the_definition(server, tmp_path):
    "Both kinds of grid, as files for `wandb sweep`."
    for cells in (
        {"k": [45, 90], "exclusive": ["0.05,0.05"]},
        [SimpleNamespace(name="cc-D16k-k90"), SimpleNamespace(name="cc-D8k-k45")],
    ):
        (tmp_path / "sweep.yaml").write_text(json.dumps(definition(cells, "card")))
        said = subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", "--project", "sweeps", str(tmp_path / "sweep.yaml")],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0 and "error" not in said.stderr.lower(), said.stderr
    assert len(server.sweeps) == 2 and "cc-D16k-k90" in str(server.sweeps[1])
