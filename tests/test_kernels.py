"""The Triton kernels compiled for real cards, without one.

As a script it prints what came out: `python tests/test_kernels.py 90`.

The interpreter, in which the notebook runs them, takes things that the compiler refuses.
Both exclude each other in one process, so the compiler gets its own.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
N, D, F, K = 1024, 4096, 16384, 90  # the card's run: batch, channels, features, active ones


def compiled(arch: int) -> list[tuple[str, int, int, int, int]]:
    "Per kernel at the card's shapes: name, warps, registers and stack bytes per thread, shared bytes per program."
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from crosscoder.model import kernels

    class Card:  # what Triton asks its driver while it compiles
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    found = []
    triton.runtime.driver.set_active(Card())
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *a, **kw: found.append(self.warmup(*a, grid=grid, **kw))
    )  # a launch only compiles
    fp32, bf16, int64 = torch.float32, torch.bfloat16, torch.int64

    def e(*shape, dtype=fp32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    names, entries = [], (e(N * K, dtype=int64), e(N * K, dtype=int64))
    for weight in (fp32, bf16):
        bits = 8 * weight.itemsize
        kernels.bag(e(F, D, dtype=weight), entries[0], e(N + 1, dtype=int64), e(N * K))
        kernels.dots(e(N, D), e(F, D, dtype=weight), *entries)
        kernels.topk(e(N, F, dtype=weight), K)
        kernels.topk(e(N, 2 * F, dtype=weight), K)
        kernels.adam(
            e(F, D),
            e(F, D),
            e(F, D, dtype=weight),
            e(F, D, dtype=weight),
            2,
            1e-4,
            0.9,
            0.999,
            1e-8,
            e(()),
            e(F, D, dtype=bf16),
        )
        names += [f"bag/{bits}", f"dots/{bits}", f"topk/{bits}", f"topk-32k/{bits}", f"adam/{bits}"]
    assert len(found) == len(names)
    return [
        (name, k.metadata.num_warps, *resources(k.asm["cubin"], triton.knobs.nvidia.cuobjdump.path), k.metadata.shared)
        for name, k in zip(names, found)
    ]


def resources(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    "Registers and stack bytes a thread, read from machine code."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.check_output([cuobjdump, "-res-usage", str(path)], text=True)
    return tuple(int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))


def elsewhere(*command: str, **env: str) -> str:
    "What another Python prints."
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=keep | env, cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile_and_stay_in_registers(arch):
    rows = [line.split() for line in elsewhere(__file__, arch).splitlines()[1:]]
    assert len(rows) == 10
    for name, warps, registers, stack, shared in rows:
        assert int(stack) <= 64, f"{name} keeps {stack} bytes a thread in memory"
        assert int(registers) * 32 * int(warps) <= 65536, f"{name}: {registers} registers × {warps} warps do not fit"
        assert int(shared) <= 48 * 1024, f"{name} takes {shared} bytes of shared memory"


SAME = """
import torch
from crosscoder.model import kernels
from crosscoder.training import adam
def run(kernel):
    adam._kernel = lambda p: kernel # as if on a GPU, or not
    g = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(70_001, generator=g), "b": torch.randn(30, 40, generator=g)}
    copies = {"b": torch.empty(30, 40, dtype=torch.bfloat16)}
    optimizer = adam.Adam(params, bits=BITS)
    for step in range(3):
        grads = {n: torch.randn(p.shape, generator=g) for n, p in params.items()}
        optimizer.step(grads, 1e-2, torch.tensor(0.5), copies)
    return {**params, **optimizer.state_dict(), "copy": copies["b"]}
x, y = run(kernels.adam), run(None)
for name in x:
    apart, same = (x[name].double() - y[name].double()).abs().max(), (x[name] == y[name]).double().mean()
    print(apart.item(), same.item(), name)
"""


@pytest.mark.parametrize("bits", [32, 16])
def test_adam_takes_the_same_steps_with_and_without_the_kernel(bits):
    """With 16 bits both draw the same random numbers, so nearly all second moments are equal bit by bit.

    The interpreter cuts a first moment off where torch rounds it.
    """
    lines = [
        line.split() for line in elsewhere("-c", SAME.replace("BITS", str(bits)), TRITON_INTERPRET="1").splitlines()
    ]
    apart, same = ({name: float(row[i]) for *row, name in lines} for i in (0, 1))
    assert sorted(apart) == ["a", "a.m", "a.v", "b", "b.m", "b.v", "copy", "step"]
    assert max(apart["a"], apart["b"]) < (1e-6 if bits == 32 else 1e-3)
    assert max(apart["a.v"], apart["b.v"]) < (1e-8 if bits == 32 else 1e-4)
    assert apart["copy"] <= 2**-6 and apart["step"] == 0
    if bits == 16:
        assert min(same["a.v"], same["b.v"]) > 0.999


STEPS = """
import torch
from dataclasses import replace
from crosscoder.data.planted import PlantedPair
from crosscoder.model import kernels, sparse
from crosscoder.model.crosscoder import CrossCoder
from crosscoder.training import adam
from crosscoder.training.config import TrainConfig
from crosscoder.training.step import Trainer
x, _ = PlantedPair(n_concepts=40, d=20, exclusive=(4, 4)).sample(64 * 6)
batch_topk = sparse.ACTIVATIONS["batchtopk"]
def run(on):
    sparse.gpu_kernels = lambda t: kernels if on else None # as if on a GPU, or not
    adam._kernel = lambda p: kernels.adam if on else None
    if on: sparse.ACTIVATIONS["batchtopk"] = replace(batch_topk, select=sparse.select_batch_topk_fixed)
    cc = CrossCoder((20, 20), 60, 4, exclusive=(6, 6), activation=CHOSEN).fit_normalizer(x)
    more = dict(precision=PRECISION, sparsity_coef=1e-3, difference_weight=WEIGHT)
    t = Trainer(cc, TrainConfig(lr=1e-2, clip=0.1, aux_coef=0.1, dead_after=64, **more))
    return [t.step(b) for b in x.split(64)], dict(cc.named_parameters())
(metrics, params), (others, same) = run(False), run(True)
numbers = max(abs(a[k] - b[k]) for a, b in zip(metrics, others) for k in a)
weights = max((p - same[n]).abs().max().item() for n, p in params.items())
print(numbers, weights, "aux" in others[-1], "difference" in others[-1])
"""


@pytest.mark.parametrize(
    "activation, precision, weight", [("topk", "fp32", 0), ("topk", "bf16", 100), ("batchtopk", "bf16", 100)]
)
def test_whole_steps_by_the_kernels_are_the_same(activation, precision, weight):
    code = STEPS
    for name, value in {"CHOSEN": activation, "PRECISION": precision, "WEIGHT": weight}.items():
        code = code.replace(name, repr(value))
    numbers, weights, aux, difference = elsewhere("-c", code, TRITON_INTERPRET="1").split()
    assert float(numbers) < 1e-3 and float(weights) < 1e-3
    assert (aux, difference) == ("True", str(weight > 0))


if __name__ == "__main__":
    print(f"{'kernel':12s} {'warps':>6s} {'registers':>10s} {'stack':>6s} {'shared':>7s}")
    for name, warps, registers, stack, shared in compiled(int(sys.argv[1])):
        print(f"{name:12s} {warps:6d} {registers:10d} {stack:6d} {shared:7d}")
