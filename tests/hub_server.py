"""A small Hugging Face hub on the loopback address.

As much of its protocol as `huggingface_hub` needs to create, upload, list and download.

Large files go by git-lfs, in one piece or in parts, and never by Xet. Repos, uploads and every byte that came in can
be looked at from the test that started it."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LICENCES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", "gpl-3.0", "other"}


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def card_faults(text):
    "What the hub's card checker says of a README.md: the rules of `modelcard.md` that concern what we write."
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", text, re.S)
    if not match:
        return ["there is no YAML front matter"]
    try:
        d = yaml.safe_load(match[1])
    except yaml.YAMLError as e:
        return [f"YAML: {' '.join(str(e).split())}"]
    if not isinstance(d, dict):
        return ["the front matter is not a mapping"]
    faults = [] if d.get("license") in LICENCES else [f'"license" must be one of {sorted(LICENCES)}']
    for key in ("tags", "datasets"):
        if key in d and not (isinstance(d[key], list) and all(isinstance(v, str) and v for v in d[key])):
            faults.append(f'"{key}" must be an array of strings')
    faults += [
        f'"datasets" holds {v!r}' for v in d.get("datasets", []) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(v))
    ]
    for i, entry in enumerate(d.get("model-index", [])):
        if not isinstance(entry.get("name"), str) or not entry.get("results"):
            faults.append(f"model-index[{i}] needs name and results")
        for r in entry.get("results", []):
            if not isinstance(r.get("task", {}).get("type"), str):
                faults.append(f"model-index[{i}].results.task.type is required")
            if not all(isinstance(r.get("dataset", {}).get(k), str) for k in ("name", "type")):
                faults.append(f"model-index[{i}].results.dataset needs name and type")
            if not all(isinstance(m.get("type"), str) and m.get("value") is not None for m in r.get("metrics", [{}])):
                faults.append(f"model-index[{i}].results.metrics need type and value")
    return faults


class Hub(ThreadingHTTPServer):
    "The server and everything it knows. `users`: token -> name and organizations; a token in `readers` may not write."

    daemon_threads = True

    def __init__(self, users, readers=(), part_size=1 << 20):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.users, self.readers, self.part_size = users, set(readers), part_size
        self.repos, self.lfs, self.parts, self.collections = {}, {}, {}, {}
        self.calls, self.received, self.commits = (
            Counter(),
            Counter(),
            [],
        )  # requests by kind; bytes by sha256 of the file; files of each commit
        self.cut = None  # (sha256 of a file or None for any, bytes): cut that upload's connection once
        self.watch = lambda oid, received: None  # called as bytes of an upload come in
        self.spoil = set()  # paths that are stored with a byte changed
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # clients that die are what some tests are about

    def repo(self, name):
        return self.repos[name]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, message, code=None):
        self.answer(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, namespace):
        "True, or the refusal that the hub would send."
        user = self.server.users.get(self.token)
        if not user:
            return self.refuse(
                401,
                "Invalid username or password." if not self.token else "Invalid credentials in Authorization header",
            )
        if namespace not in (user["name"], *user["orgs"]) or self.token in self.server.readers:
            return self.refuse(
                403,
                f'Forbidden: you don\'t have the rights to create or change a model under the namespace "{namespace}"',
            )
        return True

    def may_read(self, name):
        "True, or the refusal: 401 without a token and 404 with another's, whether it is there or not."
        repo, user = self.server.repos.get(name), self.server.users.get(self.token)
        if self.token and not user:
            return self.refuse(401, "Invalid credentials in Authorization header")
        if repo and (not repo["private"] or (user and name.split("/")[0] in (user["name"], *user["orgs"]))):
            return True
        return self.refuse(404 if user else 401, "Repository not found", "RepoNotFound")

    def route(self):
        self.path = unquote(urlsplit(self.path).path)
        for pattern, method, action in ROUTES:
            if method == self.command or (method == "GET" and self.command == "HEAD"):
                if m := re.fullmatch(pattern, self.path):
                    with self.server.lock:
                        self.server.calls[action] += 1
                    return getattr(self, action)(**m.groupdict())
        self.body()
        self.refuse(404, f"no such page: {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_HEAD = route

    def whoami(self):
        user = self.server.users.get(self.token)
        if not user:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.answer(
            200,
            {
                "type": "user",
                "name": user["name"],
                "orgs": [{"name": o} for o in user["orgs"]],
                "auth": {"type": "access_token"},
            },
        )

    def validate(self):
        faults = card_faults(json.loads(self.body())["content"])
        self.answer(400 if faults else 200, {"errors": [{"message": f} for f in faults], "warnings": []})

    def create(self):
        d = json.loads(self.body())
        user = self.server.users.get(self.token)
        namespace = d.get("organization") or (user or {}).get("name")
        if self.may_write(namespace) is not True:
            return
        name = f"{namespace}/{d['name']}"
        found = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **found})
        first = b"*.pt filter=lfs\n"
        private = d.get("visibility") == "private" or bool(d.get("private"))
        self.server.repos[name] = {
            "private": private,
            "files": {".gitattributes": ("regular", first)},
            "sha": hashlib.sha1(name.encode()).hexdigest(),
        }
        self.answer(200, found)

    def info(self, name, revision=None):
        if self.may_read(name) is not True:
            return
        repo = self.server.repos[name]
        self.answer(
            200,
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": repo["sha"],
                "private": repo["private"],
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": f} for f in repo["files"]],
            },
        )

    def entry(self, name, path):  # the file's bytes, its git name, and its sha256 if it is in LFS
        kind, value = self.server.repos[name]["files"][path]
        data = self.server.lfs[value] if kind == "lfs" else value
        return data, git_oid(value.encode() if kind == "lfs" else data), value if kind == "lfs" else None

    def tree(self, name, revision):
        if self.may_read(name) is not True:
            return
        out = []
        for path in self.server.repo(name):
            data, oid, lfs = self.entry(name, path)
            out.append(
                {
                    "type": "file",
                    "path": path,
                    "size": len(data),
                    "oid": oid,
                    **({"lfs": {"oid": lfs, "size": len(data), "pointerSize": 134}} if lfs else {}),
                }
            )
        self.answer(200, out)

    def preupload(self, name, revision):
        d = json.loads(self.body())
        if self.may_read(name) is not True or self.may_write(name.split("/")[0]) is not True:
            return
        there = self.server.repo(name)
        big = lambda f: f["size"] > 10_000_000 or f["path"].endswith((".pt", ".safetensors"))
        known = lambda p: (self.entry(name, p)[2] or self.entry(name, p)[1]) if p in there else None
        self.answer(
            200,
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if big(f) else "regular",
                        "shouldIgnore": False,
                        "oid": known(f["path"]),
                    }
                    for f in d["files"]
                ]
            },
        )

    def batch(self, name):
        d = json.loads(self.body())
        if self.may_write(name.split("/")[0]) is not True:
            return
        out = []
        for o in d["objects"]:
            if o["oid"] in self.server.lfs:
                out.append(o)
                continue
            url, size = f"{self.server.url}/upload/{o['oid']}", self.server.part_size
            n = -(-o["size"] // size)
            header = (
                {"chunk_size": str(size), **{f"{i:05d}": f"{url}/{i}" for i in range(1, n + 1)}}
                if n > 1 and "multipart" in d["transfers"]
                else {}
            )
            out.append(
                {
                    **o,
                    "actions": {
                        "upload": {"href": url, **({"header": header} if header else {})},
                        "verify": {"href": f"{self.server.url}/{name}.git/info/lfs/verify"},
                    },
                }
            )
        self.answer(
            200,
            {"transfer": "basic", "objects": out, "hash_algo": "sha256"},
            Content_Type="application/vnd.git-lfs+json",
        )

    def upload(self, oid, part=None):
        "A PUT of a file or of a part of it, counted as it comes in."
        left, data = int(self.headers["Content-Length"]), bytearray()
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                return  # the other side is gone
            left -= len(piece)
            data += piece
            with self.server.lock:
                self.server.received[oid] += len(piece)
                received = self.server.received[oid]
            self.server.watch(oid, received)
            if self.server.cut and self.server.cut[0] in (None, oid) and received >= self.server.cut[1]:
                self.server.cut = None
                self.close_connection = True
                return self.connection.close()
        with self.server.lock:
            if part is None:
                self.server.lfs[oid] = bytes(data)
            else:
                self.server.parts.setdefault(oid, {})[int(part)] = bytes(data)
        self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def complete(self, oid):
        wanted = json.loads(self.body())["parts"]
        parts = self.server.parts.pop(oid)
        if [hashlib.md5(parts[p["partNumber"]]).hexdigest() for p in wanted] != [p["etag"].strip('"') for p in wanted]:
            return self.refuse(400, "parts do not match")
        self.server.lfs[oid] = b"".join(parts[p["partNumber"]] for p in wanted)
        self.answer(200, {})

    def verify(self, name):
        d = json.loads(self.body())
        data = self.server.lfs.get(d["oid"])
        if data is None or len(data) != d["size"] or sha256(data) != d["oid"]:
            return self.refuse(400, "the file is not what it should be")
        self.answer(200, {})

    def commit(self, name, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.may_read(name) is not True or self.may_write(name.split("/")[0]) is not True:
            return
        repo, files = self.server.repos[name], {}
        for line in lines[1:]:
            v = line["value"]
            if line["key"] == "file":
                files[v["path"]] = ("regular", base64.b64decode(v["content"]))
            elif v["oid"] not in self.server.lfs:
                return self.refuse(400, f"the large file {v['path']} was not uploaded")
            else:
                files[v["path"]] = ("lfs", v["oid"])
        for path in self.server.spoil & set(files):
            files[path] = ("regular", b"something else")
        repo["files"].update(files)
        repo["sha"] = hashlib.sha1((repo["sha"] + repr(sorted(files))).encode()).hexdigest()
        self.server.commits.append(sorted(files))
        self.answer(
            200,
            {
                "success": True,
                "commitOid": repo["sha"],
                "commitUrl": f"{self.server.url}/{name}/commit/{repo['sha']}",
                "hookOutput": "",
            },
        )

    def resolve(self, name, revision, path):
        if self.may_read(name) is not True:
            return
        repo = self.server.repos[name]
        if revision not in ("main", repo["sha"]):
            return self.refuse(404, "Revision not found", "RevisionNotFound")
        if path not in repo["files"]:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        data, oid, lfs = self.entry(name, path)
        # the storage is another host than the hub, as the real one's: clients do not follow a HEAD there
        if not lfs:
            return self.send(data, ETag=f'"{oid}"', X_Repo_Commit=repo["sha"])
        self.answer(
            302,
            Location=f"http://localhost:{self.server.server_port}/cdn/{lfs}",
            X_Linked_Size=str(len(data)),
            X_Linked_ETag=f'"{lfs}"',
            X_Repo_Commit=repo["sha"],
        )

    def cdn(self, oid):
        self.send(self.server.lfs[oid], ETag=f'"{oid}"')

    def send(self, data, **headers):  # whole, or the range that was asked for
        if m := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            a, b = int(m[1]), int(m[2] or len(data) - 1)
            return self.answer(
                206, data[a : b + 1], Content_Range=f"bytes {a}-{b}/{len(data)}", Accept_Ranges="bytes", **headers
            )
        self.answer(200, data, Accept_Ranges="bytes", **headers)

    def collect(self):
        d = json.loads(self.body())
        if self.may_write(d["namespace"]) is not True:
            return
        title = re.sub(r"[^a-z0-9]+", "-", d["title"].lower()).strip("-")
        slug = f"{d['namespace']}/{title}-{sha256(d['title'].encode())[:24]}"
        if slug in self.server.collections:
            return self.answer(409, {"error": "it is there already", "slug": slug})
        self.server.collections[slug] = {
            "slug": slug,
            "title": d["title"],
            "owner": {"name": d["namespace"]},
            "items": [],
            "position": 0,
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "private": d["private"],
            "theme": "blue",
            "upvotes": 0,
            "description": d.get("description"),
        }
        self.answer(200, self.server.collections[slug])

    def collection(self, slug):
        found = self.server.collections.get(slug)
        self.answer(200, found) if found else self.refuse(404, "Collection not found")

    def collection_item(self, slug):
        d, found = json.loads(self.body()), self.server.collections[slug]
        if self.may_write(slug.split("/")[0]) is not True:
            return
        if any(i["id"] == d["item"]["id"] for i in found["items"]):
            return self.answer(409, {"error": "it is in the collection already"})
        found["items"].append({"_id": str(len(found["items"])), "position": len(found["items"]), **d["item"]})
        self.answer(200, found)


NAME, REV = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("/api/whoami-v2", "GET", "whoami"),
    ("/api/validate-yaml", "POST", "validate"),
    ("/api/repos/create", "POST", "create"),
    (rf"/api/models/{NAME}/tree/{REV}/?", "GET", "tree"),
    (rf"/api/models/{NAME}/revision/{REV}", "GET", "info"),
    (rf"/api/models/{NAME}", "GET", "info"),
    (rf"/api/models/{NAME}/preupload/{REV}", "POST", "preupload"),
    (rf"/api/models/{NAME}/commit/{REV}", "POST", "commit"),
    (rf"/{NAME}\.git/info/lfs/objects/batch", "POST", "batch"),
    (rf"/{NAME}\.git/info/lfs/verify", "POST", "verify"),
    (r"/upload/(?P<oid>\w+)(/(?P<part>\d+))?", "PUT", "upload"),
    (r"/upload/(?P<oid>\w+)", "POST", "complete"),
    (r"/cdn/(?P<oid>\w+)", "GET", "cdn"),
    ("/api/collections", "POST", "collect"),
    (r"/api/collections/(?P<slug>[\w.-]+/[\w.-]+)", "GET", "collection"),
    (r"/api/collections/(?P<slug>[\w.-]+/[\w.-]+)/items?", "POST", "collection_item"),
    (rf"/{NAME}/resolve/{REV}/(?P<path>.+)", "GET", "resolve"),
]


@contextmanager
def running(**kwargs):
    "A hub while the block runs."
    hub = Hub(**kwargs)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
