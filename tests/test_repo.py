"What holds for the repo as a whole, whatever is in it: its shape, its one direction, its notebooks' form, its safety."

import ast
import configparser
import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parent.parent
NBS = TOP / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
MODULES = sorted(p for p in (TOP / "crosscoder").glob("*.py") if p.name != "_modidx.py")

config = configparser.ConfigParser(delimiters=["="])
config.read(TOP / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


# --- reading notebooks and modules


@cache
def cells(nb: Path) -> list[tuple[str, str]]:
    "The cells of a notebook: kind and source."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]]


def code(nb: Path) -> list[tuple[int, str]]:
    "The code cells of a notebook: number and source, without IPython's own lines."
    found = [(i, src) for i, (kind, src) in enumerate(cells(nb)) if kind == "code" and not src.startswith("%%")]
    return [(i, re.sub(r"(?m)^[%!].*$", "", src)) for i, src in found]


def module_of(nb: Path) -> str | None:
    "The module that a notebook exports to; None for a study."
    return next((m[1] for _, src in code(nb) if (m := re.search(r"(?m)^#\|\s*default_exp\s+(\S+)", src))), None)


def trees() -> list[tuple[str, ast.Module]]:
    "Every piece of Python in modules and notebooks, parsed, with where it is."
    found = [(f"crosscoder/{p.name}", ast.parse(p.read_text(encoding="utf-8"))) for p in MODULES]
    return found + [(f"nbs/{nb.name} cell {i}", ast.parse(src)) for nb in NOTEBOOKS for i, src in code(nb)]


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    "The modules that a tree imports anywhere, functions too; `.sparse` and `crosscoder.sparse` are the same."
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"crosscoder.{node.module or ''}".rstrip(".") if node.level else node.module
            names += [(f"{base}.{a.name}" if base == "crosscoder" else base, node.lineno) for a in node.names]
    return names


def none(offenders: list[str]) -> None:
    "Fail with the offenders, one a line."
    if offenders:
        pytest.fail("\n".join(offenders), pytrace=False)


# --- the shape


def test_top_level_holds_what_it_should():
    if not (TOP / ".git").exists():
        pytest.skip("no git checkout")
    expected = {".ci", ".gitattributes", ".github", ".gitignore", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md"}
    expected |= {"_quarto.yml", "crosscoder", "nbs", "settings.ini", "setup.py", "tests"}
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=TOP, text=True
    )
    found = {line.split("/")[0] for line in listed.splitlines() if (TOP / line).exists()}
    none(
        [f"{n}: does not belong at the top level" for n in sorted(found - expected)]
        + [f"{n}: missing" for n in sorted(expected - found)]
    )


def test_sidebar_lists_every_notebook():
    site = yaml.safe_load((TOP / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = []
    for entry in site["sidebar"]["contents"]:
        listed += entry.get("contents") or [entry["href"]]
    found = [nb.name for nb in NOTEBOOKS]
    none([f"_quarto.yml: the sidebar lists {n}, which is not in nbs" for n in listed if n not in found])
    none([f"_quarto.yml: the sidebar lacks {n}" for n in found if n not in listed])


def test_versions_are_the_same():
    import crosscoder

    cited = yaml.safe_load((TOP / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    found = {"CITATION.cff": str(cited), "crosscoder.__version__": crosscoder.__version__}
    none(
        [
            f"{where} says {v}, settings.ini {settings['version']}"
            for where, v in found.items()
            if v != settings["version"]
        ]
    )


def test_readme_has_the_two_commands():
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", (TOP / "README.md").read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in block.splitlines()]
    for command in ("pip install -e . && crosscoder diff", "pip install -e '.[dev]' && nbdev_test && pytest"):
        assert lines.count(command) == 1, f"README.md: exactly one bash line expected that reads: {command}"


# --- what is needed


def test_requirements_are_whole():
    "nbdev and setup.py split them on white space, which would tear one with a blank in it apart."
    parts = [part for key, value in settings.items() if key.endswith("requirements") for part in value.split()]
    assert parts
    for part in parts:
        Requirement(part)  # raises for half of one


OPTIONAL = {
    "triton",
    "ray",
}  # triton comes with PyTorch where there is a GPU; Ray is for clusters, and its lack is said


def test_every_import_of_the_package_is_required():
    "Anything else may be there by chance, as long as another package wants it."
    required = {canonicalize_name(Requirement(part).name) for part in settings["requirements"].split()} | OPTIONAL
    dists = packages_distributions()
    offenders = []
    for p in MODULES:
        for name, line in imported(ast.parse(p.read_text(encoding="utf-8"))):
            root = name.split(".")[0]
            owners = {canonicalize_name(d) for d in dists.get(root, [root])}
            if root not in sys.stdlib_module_names and root != "crosscoder" and not required & owners:
                offenders.append(f"crosscoder/{p.name}:{line}: imports {root}, which settings.ini does not require")
    none(offenders)


def test_import_is_fast_and_light():
    script = "import sys, time, json, crosscoder; print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    runs = []
    for _ in range(2):  # the first one may have to compile
        runs.append(json.loads(subprocess.check_output([sys.executable, "-c", script], cwd=TOP, text=True)))
    seconds = min(s for s, _ in runs)
    heavy = {"transformers", "datasets", "peft", "wandb", "matplotlib"} & set(runs[0][1])
    assert not heavy, (
        f"import crosscoder imports {', '.join(sorted(heavy))}: import them in the functions that use them"
    )
    assert seconds < 3, f"import crosscoder takes {seconds:.1f} s of CPU time, over 3 s"


# --- one direction


def test_a_module_imports_only_from_lower_rooms():
    "Rooms stand in the order of their notebooks' names."
    rooms = {name: nb.stem for nb in NOTEBOOKS if (name := module_of(nb))}
    offenders = []
    for p in MODULES:
        if p.stem not in rooms:
            offenders.append(f"crosscoder/{p.name}: no notebook exports it")
            continue
        for name, line in imported(ast.parse(p.read_text(encoding="utf-8"))):
            root, _, room = name.partition(".")
            room = room.split(".")[0]
            if root != "crosscoder" or room == "__version__":
                continue
            if room not in rooms:
                offenders.append(
                    f"crosscoder/{p.name}:{line}: imports {name}, which is no room: name the module that has it"
                )
            elif rooms[room] >= rooms[p.stem]:
                offenders.append(
                    f"crosscoder/{p.name}:{line}: room {rooms[p.stem]} imports {room}, room {rooms[room]}: not below"
                )
    none(offenders)


# --- the form of notebooks


def test_no_cell_mixes_imports_with_computation():
    "To render a page nbdev runs every cell that imports, and with it whatever else is in it."
    offenders = []
    for nb in NOTEBOOKS:
        for i, src in code(nb):
            if "nbdev_export()" in src or re.search(r"(?m)^#\|\s*eval:\s*false", src):  # nbdev never runs these
                continue
            kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(src).body}
            if len(kinds) == 2:
                offenders.append(
                    f"nbs/{nb.name} cell {i}: imports and something else; give the imports a cell of their own"
                )
    none(offenders)


def test_module_notebooks_have_title_sentence_and_export():
    offenders = []
    for nb in NOTEBOOKS:
        kind, first = cells(nb)[0]
        if kind != "markdown" or not re.fullmatch(r"# \S.*\n\n> \S.*(\n> .*)*\s*", first):
            offenders.append(f"nbs/{nb.name}: the first cell is not `# Title`, an empty line, `> one sentence`")
        if module_of(nb) and not re.search(r"\bnbdev_export\(\)", cells(nb)[-1][1]):
            offenders.append(f"nbs/{nb.name}: the last cell does not call nbdev_export()")
    none(offenders)


# --- files are data, never code


PICKLES = {f"{m}.{f}" for m in ("pickle", "dill", "joblib") for f in ("load", "loads", "Unpickler")} | {
    "pandas.read_pickle"
}


def unsafe(node: ast.AST) -> str | None:
    "What makes a call or an import run code out of a file; None if nothing does."
    if isinstance(node, ast.ImportFrom) and PICKLES & {f"{node.module}.{a.name}" for a in node.names}:
        return f"{node.module}: loading a pickle runs what it says"
    if not isinstance(node, ast.Call):
        return None
    keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
    name = re.sub(r"^pd\.", "pandas.", ast.unparse(node.func))
    if name in PICKLES:
        return f"{name}: loading a pickle runs what it says"
    if name == "torch.load" and keywords.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if keywords.get("allow_pickle", False) is not False:
        return f"{name} with allow_pickle"
    if keywords.get("trust_remote_code", False) is not False:
        return f"{name} with trust_remote_code"
    return None


def test_files_are_never_run():
    none(
        [
            f"{where}, line {node.lineno}: {reason}"
            for where, tree in trees()
            for node in ast.walk(tree)
            if (reason := unsafe(node))
        ]
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(f)",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=trust)",
    ],
)
def test_unsafe_loading_is_seen(source):
    assert any(unsafe(node) for node in ast.walk(ast.parse(source)))
