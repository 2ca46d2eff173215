"""The sources of ops/hopper, run on a CPU by the emulator beside this file, against the reference in float64.

It does not model time, caches, a tensor core's rounding of sums, and of registers only how many there are.
"""

import sys
from pathlib import Path

import pytest
import torch
from test_triton import COEFFICIENT, STREAM, error, inputs, reference_connection

from megatron_mhc.ops.hopper import compile, pre, pre_backward
from megatron_mhc.ops.link import Written

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
from launch import Emulator, EmulatorError, Schedule, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")
BF16 = torch.bfloat16
NAMES = ("l", "mappings", "dx", "d weight", "d bias", "d alphas", "df")
ANY = Schedule()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def run(folder, monkeypatch):
    """Outputs and gradients of a connection, and what was launched."""

    def kernels(case, schedule=ANY, mutate=None, blocks=6, widest=64, ring=None, **options):
        emulator = Emulator(folder, schedule, mutate)
        for module, most, rest, stage in ((pre, 256, 27648, 128), (pre_backward, 128, 11264, 352)):
            monkeypatch.setattr(module, "kernel", emulator.kernel)
            monkeypatch.setattr(module, "tensor_map", emulator.tensor_map)
            monkeypatch.setattr(module, "multiprocessors", lambda device: blocks)
            monkeypatch.setattr(module, "WIDEST", min(widest, most))
            # bytes for `ring` tiles of so many channels
            monkeypatch.setattr(module, "SHARED", rest + ring * stage * widest if ring else compile.SHARED)
        return connection(*case, **options), emulator.launched

    return kernels


def tensors(tokens, channels, scale=1.0):
    x, weight, bias, *alphas, f = inputs(tokens, 4, channels, BF16, logits=scale)
    generator = torch.Generator().manual_seed(1)
    g, dl = (torch.randn(t.shape, generator=generator).to(BF16) for t in (x, f))
    f_bias, before = (
        torch.randn(channels, generator=generator).to(BF16),
        torch.rand(tokens, 25, generator=generator),
    )
    return x, weight, bias, alphas, f, g, dl, f_bias, before


def connection(tokens, channels, scale=1.0, v4=False, iterations=20, biased=False):
    x, weight, bias, alphas, f, g, dl, f_bias, before = tensors(tokens, channels, scale)
    options = dict(iterations=iterations, deepseek_v4=v4)
    layer_input, saved, mappings = pre.pre_forward(x, weight, bias, alphas, norm_eps=1e-6, **options)
    written = Written(before, bias, alphas[1])
    args = (x, g, f, dl, weight, bias, alphas, saved)
    made = pre_backward.pre_backward(*args, written=written, f_bias=f_bias if biased else None, **options)
    alone = pre_backward.pre_backward(*args, f_bias=f_bias if biased else None, **options)  # no df to make
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))
    df = written.take(made[0])
    return dict(zip(NAMES, (layer_input, mappings, *made, df), strict=True))


def expected(tokens, channels, scale=1.0, v4=False, iterations=20, biased=False, dx=None):
    x, weight, bias, alphas, f, g, dl, f_bias, before = tensors(tokens, channels, scale)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *alphas)]
    f = f.double() + f_bias.double() * biased
    layer_input, streams, h = reference_connection(*leaves, f, v4, iterations)
    found = torch.autograd.grad([layer_input, streams], leaves, [dl.double(), g.double()])
    mappings = torch.cat([h.h_pre, h.h_post, h.h_res.flatten(1)], dim=1)
    write = 2 * torch.sigmoid(before[:, 4:8].double() * alphas[1].double() + bias[4:8].double())
    df = torch.einsum("tn,tnc->tc", write, dx.double())  # of dx as it was rounded
    return [layer_input, mappings, *found[:3], torch.cat(found[3:]), df]


CASES = [
    dict(case=(1, 16)),
    dict(case=(5, 48), v4=True),
    dict(case=(37, 80), scale=3.0, biased=True),
    dict(case=(70, 128), v4=True, ring=3),
    dict(case=(200, 208), blocks=4, ring=3, biased=True, v4=True),
    dict(case=(200, 144), blocks=7, ring=3),
    dict(case=(40, 272), widest=128, iterations=3),
    dict(case=(33, 256), widest=256, blocks=2, iterations=1),
    dict(case=(33, 192), widest=192, blocks=2),
    *(dict(case=(40, 128, scale)) for scale in (8.0, 30.0, 3000.0)),
    dict(case=(40, 128, 3000.0), v4=True),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_outputs_and_every_gradient_match_float64(run, options):
    options = dict(options)
    case, scale = options.pop("case"), options.pop("scale", None)
    case = case if scale is None else (*case, scale)
    got, launched = run(case, **options)
    assert [name for name, *_ in launched] == ["pre", "pre_backward", "pre_backward"]
    own = {key: value for key, value in options.items() if key in ("v4", "iterations", "biased")}
    want = expected(*case, **own, dx=got["dx"])
    for (name, value), exact in zip(got.items(), want, strict=True):
        limit = STREAM[BF16] if name in ("l", "dx", "df") else COEFFICIENT[BF16]
        if exact.norm() < 1e-6:  # saturated logits: nothing is left to compare
            assert value.norm() < 1e-5, name
        else:
            assert error(value, exact) <= limit, name


SCHEDULES = [
    Schedule(order=0),
    Schedule(seed=2, order=2),
    Schedule(seed=3, copies=1),
    Schedule(seed=4, copies=2),
    Schedule(seed=5, late_blocks=True),
    Schedule(seed=6, resident=2),  # one group at a time
    *(Schedule(seed=10 + warp, starved_warps=1 << warp, starved_block=warp % 5 - 1) for warp in range(16)),
    *(Schedule(seed=30 + block, starved_warps=0xFFFF, starved_block=block) for block in range(4)),
    Schedule(seed=40, starved_warps=0xFFFF, starved_lanes=0xF0F0),
]


def test_every_schedule_gives_the_same_bits(run):
    wanted = None
    for schedule in [ANY, *SCHEDULES]:
        got, launched = run((300, 80), schedule, blocks=4, ring=3)
        assert all(blocks == 4 and d["STAGES"] == 3 for _, blocks, d in launched)  # ten tiles a group
        wanted = wanted or got
        for name, value in got.items():
            assert torch.equal(value, wanted[name]), (schedule, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_schedules(run, seed):
    wanted, _ = run((420, 144), blocks=6, ring=3)
    for k in range(3):
        schedule = Schedule(3 * seed + k, order=1 + seed % 2, copies=k, resident=(3, 4, 6)[seed % 3])
        got, _ = run((420, 144), schedule, blocks=6, ring=3)
        assert all(torch.equal(value, wanted[name]) for name, value in got.items()), schedule


def replaced(old, new):
    return lambda source: source.replace(old, new, 1)


RELEASE = "      if (lane == 0) barrier_arrive(empties + 8 * stage);\n    }"
BUGS = {
    "the warps that make l keep their tiles": (RELEASE, "    }"),
    "the copying warp waits for the wrong phase": ("(it / STAGES - 1) & 1", "(it / STAGES) & 1"),
    "a slot is overwritten before all have read it": ("#define EXCHANGE (2 * STAGES)", "#define EXCHANGE 1"),
    "groups add to dphi without waiting for their turn": ("await(turn, at.group, lane);", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(run, bug):
    wanted, _ = run((300, 80), blocks=4, ring=3)
    found = False
    for schedule in (ANY, *SCHEDULES[:5]):
        try:
            got, _ = run((300, 80), schedule, replaced(*BUGS[bug]), blocks=4, ring=3)
            found |= any(not torch.equal(value, wanted[name]) for name, value in got.items())
        except EmulatorError as stopped:
            assert "deadlock" in str(stopped) or "barrier" in str(stopped) or "copy" in str(stopped)
            found = True
    assert found
