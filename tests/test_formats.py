"Other projects' files: read and written as their own code does it, refused where they do not fit."

import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import HERE
from safetensors.torch import load_file, save_file

from crosscoder import BadInput, CrossCoder
from crosscoder.basics import open_safetensors
from crosscoder.model.formats import FORMATS, load_weights, read_tensors, write_tensors

FILES = HERE / "fixtures" / "formats"
REFUSED = {"llama_topk"}
NAMES = sorted(p.stem for p in FILES.glob("*.safetensors") if p.stem not in REFUSED)
BY_PREFIX = {"dl": "dictionary_learning", "llama": "llamascopium", "crosscode": "crosscode", "ckkissane": "ckkissane"}
format_of = lambda name: BY_PREFIX[name.split("_")[0]]


def load(folder, *warned):
    "A model from a folder; it has to warn of exactly this."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cc = CrossCoder.load(folder)
    assert len(caught) == len(warned) and all(w in str(c.message) for w, c in zip(warned, caught)), [
        str(c.message) for c in caught
    ]
    return cc


WARNED = {"ckkissane": ["has no normalizer statistics"], "crosscode_jump": ["a threshold for each feature"]}


@torch.no_grad()
def same(cc, expected, tolerance=1e-6):
    "Features and reconstruction of raw activations, relative to the largest."
    recon, features = cc(expected["x"])
    for found, want in ((features, expected["features"]), (recon, expected["reconstruction"])):
        assert (found - want).abs().max() <= tolerance * want.abs().max(), (found - want).abs().max() / want.abs().max()
    assert ((features > 0) == (expected["features"] > 0)).all() and (expected["features"] > 0).any()


# --- theirs


@pytest.mark.parametrize("name", [n for n in NAMES if n != "crosscode_jump"])
def test_reads_what_their_code_wrote(name):
    "Features and reconstructions are those that the project's own forward gave."
    same(load(FILES / name, *WARNED.get(name, [])), load_file(FILES / f"{name}.safetensors"))


def test_jumprelu_with_many_thresholds_keeps_all_but_the_unit():
    cc = load(FILES / "crosscode_jump", *WARNED["crosscode_jump"])
    expected = load_file(FILES / "crosscode_jump.safetensors")
    thresholds = read_tensors(FILES / "crosscode_jump" / "model.pt")["_activation_fn.log_threshold_L"].exp()
    same(cc, {**expected, "features": expected["features"] * thresholds.median() / thresholds})


def test_what_selects_per_model_is_refused():
    with pytest.raises(BadInput, match=r"selects features for each model by itself \(topk"):
        CrossCoder.load(FILES / "llama_topk")


def test_partition_of_the_dfc_is_kept():
    cc = load(FILES / "dl_dfc")
    assert (cc.n_a, cc.n_b, cc.n_shared, cc.activation, cc.k) == (2, 3, 11, "batchtopk", 4)
    assert cc.verify_partition_integrity() == {"enc_max_violation": 0.0, "dec_max_violation": 0.0}


def test_what_is_not_in_the_file_can_be_fitted():
    "ckkissane's scale is sqrt(d) over the mean norm of each model; fitted, features are the scaled ones'."
    cc, x = load(FILES / "ckkissane", *WARNED["ckkissane"]), load_file(FILES / "ckkissane.safetensors")["x"]
    factor = 8**0.5 / x.norm(dim=2).mean(0)
    plain = load(FILES / "ckkissane", *WARNED["ckkissane"])
    cc.fit_normalizer(x)
    with torch.no_grad():
        recon, features = plain(x * factor[:, None])
        same(cc, {"x": x, "features": features, "reconstruction": recon / factor[:, None]}, 1e-5)
    assert repr(cc).endswith("normalizer norm)")


@pytest.mark.parametrize("name", NAMES)
def test_load_save_load(name, tmp_path):
    "Written again in its own format and read, it computes the same; every other file is as it was."
    format, warned = format_of(name), WARNED.get(name, [])
    cc = load(FILES / name, *warned)
    if name == "ckkissane":
        cc.fit_normalizer(load_file(FILES / "ckkissane.safetensors")["x"])
    x = load_file(FILES / f"{name}.safetensors")["x"]
    with torch.no_grad():
        recon, features = cc(x)
    cc.save(tmp_path, format=format)
    back = load(tmp_path)
    same(back, {"x": x, "features": features, "reconstruction": recon})
    assert (back.partition, back.activation, back.info) == (cc.partition, cc.activation, cc.info)
    native = tmp_path / "native"
    cc.save(native)
    assert all(a.equal(b) for a, b in zip(CrossCoder.load(native).state_dict().values(), cc.state_dict().values()))


# --- ours


def raw(rows=40, d=8, models=2):
    return (
        torch.randn(rows, models, d, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 6, models)[:, None]
        + 2
    )


def make(activation, exclusive=(0.13, 0.2), normalizer="zscore", d=8, models=2):
    "A random crosscoder of raw activations, as after training: every parameter and the normalizer count."
    cc = CrossCoder((d,) * models, 16, 4, exclusive, activation, normalizer).fit_normalizer(raw(d=d, models=models))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in cc.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
        cc.apply_partition()
        if activation == "batchtopk":
            cc.threshold.fill_(cc.eval().encode(raw(d=d, models=models)).flatten().topk(4 * 40).values[-1] * 0.99)
    cc.info = {"models": ["a", "b"], "layer": 1}
    return cc.eval()


HOLDS = {
    "native": ("relu", "topk", "batchtopk"),
    "card": ("relu", "topk", "batchtopk"),
    "dictionary_learning": ("relu", "batchtopk"),
    "ckkissane": ("relu",),
    "crosscode": ("relu", "topk", "batchtopk"),
    "llamascopium": ("relu",),
}
OURS = [
    (f, a, e, n)
    for f, kinds in HOLDS.items()
    for a in kinds
    for e in ((0.13, 0.2), None)
    for n in ("zscore", "scale")
    if f != "llamascopium" or e is None
]


@pytest.mark.parametrize("format, activation, exclusive, normalizer", OURS)
def test_our_models_there_and_back(format, activation, exclusive, normalizer, tmp_path):
    cc = make(activation, exclusive, normalizer)
    with torch.no_grad():
        recon, features = cc(raw())
    cc.save(tmp_path, format=format)
    back = load(tmp_path)
    same(back, {"x": raw(), "features": features, "reconstruction": recon})
    assert (back.partition, back.activation, back.k) == (
        cc.partition,
        cc.activation,
        cc.k if activation != "relu" or format != "card" else back.k,
    )
    if format not in ("card",):
        assert back.info == cc.info


@pytest.mark.parametrize("name", ["held", "frozen"])
def test_the_frozen_buffer_is_called_held_in_files(name, tmp_path):
    "We write the name that our files have always had, and read both."
    cc = make("relu")
    cc.frozen[2] = 1
    cc.save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, header = open_safetensors(path)
    assert "held" in tensors and "frozen" not in tensors
    tensors[name] = tensors.pop("held")
    write_tensors(path, tensors, header)
    assert load_weights(path).state["frozen"].equal(cc.frozen)
    assert CrossCoder.load(tmp_path).frozen.equal(cc.frozen)


@pytest.mark.parametrize("format", ["dictionary_learning", "crosscode", "llamascopium"])
def test_three_models(format, tmp_path):
    cc = make("relu", None if format == "llamascopium" else (2, 3, 4), models=3)
    with torch.no_grad():
        recon, features = cc(raw(models=3))
    cc.save(tmp_path, format=format)
    same(load(tmp_path), {"x": raw(models=3), "features": features, "reconstruction": recon})


LIKE = {
    "dictionary_learning": ("dl_none", "ae.pt", "batchtopk"),
    "ckkissane": ("ckkissane", "0.pt", "relu"),
    "crosscode": ("crosscode_jump", "model.pt", "batchtopk"),
    "llamascopium": ("llama_inference", "sae_weights.safetensors", "relu"),
}


@pytest.mark.parametrize("format", LIKE)
def test_what_we_write_looks_like_theirs(format, tmp_path):
    "Names, shapes and types of every tensor, and all keys of the settings that their code reads."
    name, file, activation = LIKE[format]
    make(activation, None).save(tmp_path, format=format)
    written = next(p for p in tmp_path.iterdir() if p.suffix in (".pt", ".safetensors"))
    shape = lambda path: {re_hook(k): (tuple(t.shape), t.dtype) for k, t in read_tensors(path).items()}
    re_hook = lambda k: (
        k
        if "activation_norm." not in k
        else f"activation_norm.{k[-1] if k[-2] == '.' else 'ab'[int(k.split('model_')[1][0])]}"
    )
    theirs = shape(FILES / name / file)
    assert shape(written) == theirs


def test_written_features_by_their_formulas(tmp_path):
    """What each project's forward does with our files, written down here once more in plain float64.

    The same lines give the numbers of their own files."""

    def dl(t, x):
        f = torch.einsum(
            "bmd,mdf->bf",
            (x - t["activation_mean"]) * t["activation_global_scale"][:, None]
            if not t["activation_mean"].isnan().any()
            else x,
            t["encoder.weight"],
        )
        f = (f + t["encoder.bias"]).relu()
        n = {1: t["decoder.weight"].norm(dim=2).sum(0), 2: t["decoder.weight"].norm(dim=(0, 2)), 4: torch.ones(())}[
            int(t["code_normalization_id"])
        ]
        f = f * (f * n > t["threshold"]) if "k" in t else f
        out = torch.einsum("bf,mfd->bmd", f, t["decoder.weight"]) + t["decoder.bias"]
        return f * n, out / t["activation_global_scale"][:, None] + t["activation_mean"] if not t[
            "activation_mean"
        ].isnan().any() else out

    def ckkissane(t, x):
        f = (torch.einsum("bmd,mdf->bf", x, t["W_enc"]) + t["b_enc"]).relu()
        return f, torch.einsum("bf,fmd->bmd", f, t["W_dec"]) + t["b_dec"]

    def crosscode(t, x):
        f = torch.einsum("bmd,mdf->bf", x, t["_W_enc_XiDiL"].flatten(0, 1)) + t["b_enc_L"]
        f = f * (f > t["_activation_fn.log_threshold_L"].exp())
        return f, torch.einsum("bf,fmd->bmd", f, t["_W_dec_LXoDo"].flatten(1, 2)) + t["_b_dec_XoDo"].flatten(0, 1)

    def llamascopium(t, x):
        factor = 8**0.5 / torch.stack([v for k, v in sorted(t.items()) if k.startswith("dataset_average")])[:, None]
        f = (torch.einsum("bmd,mdf->bf", x * factor, t["W_E"]) + t["b_E"].sum(0)).relu()
        return f, (torch.einsum("bf,mfd->bmd", f, t["W_D"]) + t["b_D"]) / factor

    for formula, name, file in [
        (dl, "dl_batchtopk", "ae.pt"),
        (dl, "dl_sae", "ae.pt"),
        (ckkissane, "ckkissane", "0.pt"),
        (crosscode, "crosscode_jump", "model.pt"),
        (llamascopium, "llama_dataset", "sae_weights.safetensors"),
    ]:
        expected = {k: v.double() for k, v in load_file(FILES / f"{name}.safetensors").items()}
        double = lambda path: {k: v.double() if v.is_floating_point() else v for k, v in read_tensors(path).items()}
        found = formula(double(FILES / name / file), expected["x"])
        for a, b in zip(found, (expected["features"], expected["reconstruction"])):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
        format = format_of(name)
        cc = make(LIKE[format][2], None if formula is llamascopium else (0.13, 0.2))
        cc.save(tmp_path / name, format=format)
        with torch.no_grad():
            recon, features = cc(raw())
        found = formula(
            double(next(p for p in (tmp_path / name).iterdir() if p.suffix in (".pt", ".safetensors"))), raw().double()
        )
        for a, b in zip(found, (features, recon)):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max(), name


# --- with their own packages, where they are


PEERS = os.environ.get(
    "CROSSCODER_PEERS"
)  # a folder with a folder of packages for each project, for those that pip does not know or that would not go together


def has_crosscoders(path):
    return (
        "class BatchTopKCrossCoder" in (text := path.read_text())
        or "class ModelHookpointAcausalCrosscoder" in text
        or "class Crosscoder(" in text
    )


def peer(name, folder, x, tmp_path):
    "Features and reconstruction that a project's own code computes with a folder, in a process of its own."
    if not PEERS and not (
        name != "ckkissane"
        and (spec := find_spec(name))
        and any(map(has_crosscoders, Path(spec.origin).parent.rglob("*.py")))
    ):
        pytest.skip(f"{name} with crosscoders is not installed")
    save_file({"x": x}, tmp_path / "io.safetensors")
    path = os.pathsep.join([*([os.path.join(PEERS, name)] if PEERS else []), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(FILES / "make.py"), "run", name, str(folder), str(tmp_path / "io.safetensors")],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "io.safetensors")


DFC = (0.13, 0.2)


@pytest.mark.parametrize(
    "name, activation, exclusive",
    [
        ("dictionary_learning", "batchtopk", DFC),
        ("dictionary_learning", "relu", None),
        ("ckkissane", "relu", DFC),
        ("crosscode", "batchtopk", DFC),
        ("crosscode", "topk", None),
        ("llamascopium", "relu", None),
    ],
)
def test_their_code_reads_what_we_write(name, activation, exclusive, tmp_path):
    cc = make(activation, exclusive)
    cc.save(tmp_path / "out", format=name)
    same(cc, peer(name, tmp_path / "out", raw(), tmp_path))


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "topk"])
def test_saelens_loads_one_half(activation, tmp_path):
    "Its encoder takes the other model at its mean, its decoder is the crosscoder's."
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    cc, x = make(activation), raw()
    cc.save(tmp_path / "out", format="saelens", model=1)
    sae = sae_lens.SAE.load_from_disk(str(tmp_path / "out"))
    with torch.no_grad():
        out = {"features": sae.encode(x[:, 1]), "reconstruction": sae(x[:, 1])}
    mean = cc.origin.view(2, 8)
    with torch.no_grad():
        expected = cc.encode(torch.stack([mean[0].expand(len(x), -1), x[:, 1]], 1)).clone()
        expected[:, : cc.a_end] = 0  # A's own features are zeros in B's half
        alike = (expected > 0).sum(1) == (out["features"] > 0).sum(1)
        assert alike.float().mean() > (0.2 if activation == "topk" else 0.99)  # top-k gives A's places to others
        assert (out["features"] - expected)[alike].abs().max() <= 1e-6 * expected.abs().max()
        decoded = cc.decode(out["features"])[:, 1]
    assert (out["reconstruction"] - decoded).abs().max() <= 1e-6 * decoded.abs().max()
    assert "encoder is approximate" in sae.cfg.metadata.note


# --- what does not fit


def refuses(part, f):
    with pytest.raises(BadInput) as e:
        f()
    assert part in str(e.value), str(e.value)


def test_what_a_format_cannot_hold(tmp_path):
    wide = CrossCoder((8, 12), 32, 4, activation="relu")
    for format in ("card", "dictionary_learning", "ckkissane", "crosscode", "llamascopium"):
        refuses("models of one width, this one has (8, 12)", lambda: wide.save(tmp_path / "x", format=format))
    refuses(
        "this one has topk: save it without", lambda: make("topk").save(tmp_path / "x", format="dictionary_learning")
    )
    refuses(
        "plain ReLU features, this one has batchtopk",
        lambda: make("batchtopk").save(tmp_path / "x", format="ckkissane"),
    )
    refuses("this one has 5 that do not", lambda: make("relu").save(tmp_path / "x", format="llamascopium"))
    refuses("has no threshold yet", lambda: CrossCoder((8, 8), 32, 4).save(tmp_path / "x", format="saelens"))
    refuses("'sae_lens' is unknown: one of native, card", lambda: wide.save(tmp_path / "x", format="sae_lens"))
    assert not (tmp_path / "x").exists()


SHAPES = [
    ("dl_batchtopk", "ae.pt", "decoder.weight", (2, 8, 16), "(2, 16, 8), which is (M, F, d)"),
    ("ckkissane", "0.pt", "W_dec", (2, 16, 8), "(16, 2, 8), which is (F, M, d)"),
    ("crosscode_topk", "model.pt", "_W_dec_LXoDo", (16, 2, 8), "(16, 2, 1, 8), which is (F, M, P, d)"),
    ("llama_dataset", "sae_weights.safetensors", "b_E", (16,), "(2, 16), which is (M, F)"),
    ("dl_hub", "model.safetensors", "encoder.bias", (17,), "(16,), which is (F)"),
    ("llama_dataset", "sae_weights.safetensors", "W_D", (2, 8, 16), "(2, 16, 8), which is (M, F, d)"),
]


@pytest.mark.parametrize("name, file, tensor, shape, expected", SHAPES)
def test_foreign_checkpoint_of_the_wrong_shape(name, file, tensor, shape, expected, tmp_path):
    shutil.copytree(FILES / name, tmp_path / name)
    write_tensors(tmp_path / name / file, {**read_tensors(FILES / name / file), tensor: torch.zeros(shape)})
    refuses(f"{tensor} has the shape {shape}, expected {expected}", lambda: CrossCoder.load(tmp_path / name))


@pytest.mark.parametrize(
    "name, settings, change, part",
    [
        ("dl_batchtopk", "config.json", {"trainer": {"dict_size": 32}}, "the settings say F = 32, the tensors have 16"),
        ("dl_hub", "config.json", {"code_normalization": "L7"}, None),  # the file's own number goes first
        (
            "crosscode_topk",
            "model_cfg.yaml",
            {"activation_fn": {"classname": "GroupMaxActivation", "cfg": {}}},
            "'GroupMaxActivation', expected one of",
        ),
        ("crosscode_topk", "model_cfg.yaml", {"d_model": 16}, "the settings say d = 16, the tensors have 8"),
        ("llama_dataset", "config.json", {"norm_activation": "batch-wise"}, "scales every batch by its own norm"),
        (
            "ckkissane",
            "0_cfg.json",
            {"crosscoder": {"exclusive": [1, 0], "normalizer": "folded"}},
            "the partition in the settings is not this file's",
        ),
        ("ckkissane", "0_cfg.json", {"crosscoder": {"exclusive": "all"}}, "expected exclusive (counts)"),
        (
            "crosscode_topk",
            "model_cfg.yaml",
            {"activation_fn": {"classname": "TopkActivation", "cfg": {"k": "three"}}},
            "not as the crosscode format has them: TypeError",
        ),
    ],
)
def test_settings_that_do_not_fit(name, settings, change, part, tmp_path):
    import yaml

    shutil.copytree(FILES / name, tmp_path / name)
    said = yaml.safe_load((FILES / name / settings).read_text())
    (tmp_path / name / settings).write_text(json.dumps({**said, **change}))
    if part:
        refuses(part, lambda: CrossCoder.load(tmp_path / name))
    else:
        load(tmp_path / name)


@pytest.mark.parametrize("name, file", [("crosscode_topk", "model_cfg.yaml"), ("llama_dataset", "config.json")])
def test_settings_that_are_missing(name, file, tmp_path):
    shutil.copytree(FILES / name, tmp_path / name)
    (tmp_path / name / file).unlink()
    refuses(f"but no {file}", lambda: CrossCoder.load(tmp_path / name))


def test_swapped_models_are_seen(tmp_path):
    "The first model of a file is the first here: with both turned round, features are not the expected ones."
    shutil.copytree(FILES / "ckkissane", tmp_path / "x")
    t = read_tensors(FILES / "ckkissane" / "0.pt")
    write_tensors(tmp_path / "x" / "0.pt", {**t, "W_enc": t["W_enc"].flip(0)})
    with pytest.raises(AssertionError):
        same(load(tmp_path / "x", *WARNED["ckkissane"]), load_file(FILES / "ckkissane.safetensors"))


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("a pickle was run",)

    torch.save({"encoder.weight": Evil()}, tmp_path / "ae.pt")
    refuses("pickle with code, which is never run", lambda: CrossCoder.load(tmp_path))
    shutil.copytree(FILES / "crosscode_topk", tmp_path / "y")
    (tmp_path / "y" / "model_cfg.yaml").write_text("n_models: !!python/object/apply:builtins.print ['yaml was run']")
    refuses("is not plain YAML", lambda: CrossCoder.load(tmp_path / "y"))
    torch.save({"step": 3, "model": {}}, tmp_path / "ae.pt")
    refuses("step: int", lambda: CrossCoder.load(tmp_path))
    assert "was run" not in capsys.readouterr().out


def test_the_table_is_whole():
    assert list(FORMATS) == [
        "native",
        "card",
        "dictionary_learning",
        "ckkissane",
        "crosscode",
        "llamascopium",
        "saelens",
    ]
    assert {format_of(n) for n in NAMES} == set(FORMATS) - {"native", "card", "saelens"}
