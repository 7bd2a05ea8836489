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
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (TOP / "crosscoder").rglob("*.py") if p.name != "_modidx.py")
PACKAGES = [p for p in MODULES if p.name == "__init__.py"]  # nbdev makes them; all but the first are empty

config = configparser.ConfigParser(delimiters=["="])
config.read(TOP / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


# --- reading notebooks and modules


def where(path: Path) -> str:
    "A file's place in the checkout."
    return path.relative_to(TOP).as_posix()


@cache
def cells(nb: Path) -> list[tuple[str, str]]:
    "The cells of a notebook: kind and source."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]]


def code(nb: Path) -> list[tuple[int, str]]:
    "The code cells of a notebook: number and source, without IPython's own lines."
    found = [(i, src) for i, (kind, src) in enumerate(cells(nb)) if kind == "code" and not src.startswith("%%")]
    return [(i, re.sub(r"(?m)^[%!].*$", "", src)) for i, src in found]


def module_of(nb: Path) -> Path | None:
    "The module that a notebook exports to; None for a study."
    names = (re.search(r"(?m)^#\|\s*default_exp\s+(\S+)", src) for _, src in code(nb))
    name = next((m[1] for m in names if m), None)
    return name and TOP / "crosscoder" / f"{name.replace('.', '/')}.py"


def number(nb: Path) -> int:
    "The number in a notebook's name."
    return int(nb.stem.split("_")[0])


NUMBERED = sorted((nb for nb in NOTEBOOKS if nb.stem[0].isdigit()), key=number)
ROOMS = {module_of(nb): nb for nb in NUMBERED if module_of(nb)}


def trees() -> list[tuple[str, ast.Module]]:
    "Every piece of Python in modules and notebooks, parsed, with where it is."
    found = [(where(p), ast.parse(p.read_text(encoding="utf-8"))) for p in MODULES]
    return found + [(f"{where(nb)} cell {i}", ast.parse(src)) for nb in NOTEBOOKS for i, src in code(nb)]


def none(offenders: list[str]) -> None:
    "Fail with the offenders, one a line."
    if offenders:
        pytest.fail("\n".join(offenders), pytrace=False)


# --- the shape


def test_everything_was_walked():
    "The tests below say nothing of a file that they do not see."
    assert len(ROOMS) >= 41 and len(NOTEBOOKS) >= len(ROOMS) + 7, (len(ROOMS), len(NOTEBOOKS))
    filled = {p for p in PACKAGES if p.stat().st_size}
    assert {p for p in MODULES if p not in PACKAGES} | filled == set(ROOMS)
    assert len(trees()) > 1700


def test_top_level_holds_what_it_should():
    if not (TOP / ".git").exists():
        pytest.skip("no git checkout")
    expected = {".ci", ".gitattributes", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md"}
    expected |= {"CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "_quarto.yml", "crosscoder"}
    expected |= {"nbs", "settings.ini", "setup.py", "tests"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=TOP, text=True).splitlines()
    found = {line.split("/")[0] for line in listed if (TOP / line).exists()}
    none([f"{n}: does not belong at the top level" for n in sorted(found - expected)])
    none([f"{n}: missing" for n in sorted(expected - found)])


def test_notebooks_and_modules_mirror_each_other():
    offenders = []
    for module, nb in ROOMS.items():
        name = nb.stem.split("_", 1)[1]
        room = nb.parent.relative_to(NBS)
        expected = TOP / "crosscoder" / room / f"{'__init__' if name in ('package', 'callable') else name}.py"
        if module != expected:
            offenders.append(f"{where(nb)} exports {where(module)}, expected {where(expected)}")
    numbers = [number(nb) for nb in NUMBERED]
    offenders += [f"the number {n} stands twice" for n in sorted(set(numbers)) if numbers.count(n) > 1]
    none(offenders)


def test_the_linter_has_the_rooms_in_the_order_of_their_numbers():
    "`.ci/importlinter` says that imports run one way; its order is that of the notebooks."
    contracts = configparser.ConfigParser()
    contracts.read(TOP / ".ci/importlinter")
    below = {module: number(nb) for module, nb in ROOMS.items()}
    seen = 0
    for name in contracts.sections()[1:]:
        base = TOP / contracts[name]["containers"].strip().replace(".", "/")
        layers = contracts[name]["layers"].split()
        numbers = [
            max(n for m, n in below.items() if m in (base / f"{x}.py",) or base / x in m.parents) for x in layers
        ]
        order = [n for x, n in zip(layers, numbers) if x != "research"]  # above all others, but for the command bench
        assert order == sorted(order, reverse=True), f"{name}: {list(zip(layers, numbers))}"
        seen += len(layers)
    assert seen >= len(ROOMS) - 1


def test_no_underscored_name_crosses_a_door():
    offenders = []
    for p in MODULES:
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("crosscoder")):
                private = [a.name for a in node.names if re.match(r"_[^_]", a.name)]
                offenders += [f"{where(p)}:{node.lineno}: imports {n}" for n in private]
    none(offenders)


def test_sidebar_lists_every_notebook():
    site = yaml.safe_load((TOP / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = []
    for entry in site["sidebar"]["contents"]:
        listed += entry.get("contents") or [entry["href"]]
    found = [nb.relative_to(NBS).as_posix() for nb in NOTEBOOKS]
    none([f"_quarto.yml: the sidebar lists {n}, which is not in nbs" for n in listed if n not in found])
    none([f"_quarto.yml: the sidebar lacks {n}" for n in found if n not in listed])


def test_versions_are_the_same():
    import crosscoder

    cited = yaml.safe_load((TOP / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    found = {"CITATION.cff": str(cited), "crosscoder.__version__": crosscoder.__version__}
    assert settings["version"] in (TOP / "CHANGELOG.md").read_text(encoding="utf-8")
    none(
        [
            f"{name} says {v}, settings.ini {settings['version']}"
            for name, v in found.items()
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


def outside(tree: ast.AST) -> list[tuple[str, int]]:
    "The packages of others that a module imports anywhere, functions too."
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(a.name.split(".")[0], node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.append((node.module.split(".")[0], node.lineno))
    return [(n, line) for n, line in names if n not in sys.stdlib_module_names and n != "crosscoder"]


def test_every_import_of_the_package_is_required():
    "Anything else may be there by chance, as long as another package wants it."
    required = {canonicalize_name(Requirement(part).name) for part in settings["requirements"].split()} | OPTIONAL
    dists = packages_distributions()
    offenders, seen = [], set()
    for p in MODULES:
        for root, line in outside(ast.parse(p.read_text(encoding="utf-8"))):
            seen.add(root)
            if not required & {canonicalize_name(d) for d in dists.get(root, [root])}:
                offenders.append(f"{where(p)}:{line}: imports {root}, which settings.ini does not require")
    assert {"torch", "transformers", "einops", "scipy"} <= seen
    none(offenders)


def test_import_is_fast_and_light():
    script = "import sys, time, json, crosscoder; print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    runs = []
    for _ in range(2):  # the first one may have to compile
        runs.append(json.loads(subprocess.check_output([sys.executable, "-c", script], cwd=TOP, text=True)))
    seconds = min(s for s, _ in runs)
    heavy = {"transformers", "datasets", "peft", "wandb", "matplotlib", "scipy"} & set(runs[0][1])
    assert not heavy, (
        f"import crosscoder imports {', '.join(sorted(heavy))}: import them in the functions that use them"
    )
    assert seconds < 3, f"import crosscoder takes {seconds:.1f} s of CPU time, over 3 s"


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
                    f"{where(nb)} cell {i}: imports and something else; give the imports a cell of their own"
                )
    none(offenders)


def test_notebooks_have_title_sentence_and_export():
    offenders = []
    for nb in NOTEBOOKS:
        kind, first = cells(nb)[0]
        if kind != "markdown" or not re.fullmatch(r"# \S.*\n\n> \S.*(\n> .*)*\s*", first):
            offenders.append(f"{where(nb)}: the first cell is not `# Title`, an empty line, `> one sentence`")
        if module_of(nb) and not re.search(r"\bnbdev_export\(\)", cells(nb)[-1][1]):
            offenders.append(f"{where(nb)}: the last cell does not call nbdev_export()")
    none(offenders)


def pictures(nb: Path) -> list[tuple[int, int]]:
    "The pictures that a notebook has saved: number of the cell, bytes."
    found = []
    for i, c in enumerate(json.loads(nb.read_text(encoding="utf-8"))["cells"]):
        for output in c.get("outputs", []):
            kept = {k: v for k, v in output.get("data", {}).items() if k.startswith("image/")}
            found += [(i, len("".join(v)) * (3 if k == "image/png" else 4) // 4) for k, v in kept.items()]
    return found


def test_saved_pictures_are_small():
    "60 kB each, 4 MB for all notebooks: they are read on trains and cloned in classrooms."
    found = [(nb, *p) for nb in NOTEBOOKS for p in pictures(nb)]
    assert len(found) > 40
    none([f"{where(nb)} cell {i}: a picture of {size / 1000:.0f} kB" for nb, i, size in found if size > 60_000])
    assert sum(nb.stat().st_size for nb in NOTEBOOKS) < 4_000_000


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
            f"{place}, line {node.lineno}: {reason}"
            for place, tree in trees()
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
