"""Triton's kernels of every form, forward and every gradient, against the reference in float64.

H_res = I, fixed h_pre and h_post, in each arithmetic and in every combination with what the kernels serve;
and three streams, in tiles of four. On a CPU in Triton's interpreter; with MEGATRON_MHC_GPU_TESTS=1 on the
GPU, at larger sizes too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import COEFFICIENT, DEVICE, ON_GPU, STREAM, error
from ops_chains import AHEAD, apart, bias_like, eighths, optimize, same
from ops_forms import (
    ALL,
    BF16,
    CASES,
    F32,
    FORMS,
    chain,
    connection,
    errors_of,
    exact_mappings,
    inputs,
    leaves_of,
    noise,
    norm_for,
    options_of,
)

from megatron_mhc.ops import autograd, boundary, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.options import MIXES, READS, WRITES, Form, Options
from megatron_mhc.ops.triton import replay, stage_ends
from megatron_mhc.ops.triton.mapping_backward import mapping_backward
from megatron_mhc.ops.triton.post_res import post_backward, post_res_forward
from megatron_mhc.ops.triton.post_res_project import post_res_project
from megatron_mhc.ops.triton.pre import pre_forward
from megatron_mhc.ops.triton.pre_backward import pre_backward

pytestmark = pytest.mark.usefixtures("poisoned")
if ON_GPU:
    CASES = CASES + [
        (4096, 4, 2560, BF16, "hy_v4", READS + WRITES, True),
        (1000, 3, 1040, BF16, "paper", ALL, False),
        (333, 4, 272, F32, "deepseek_v4", WRITES + MIXES, True),
        (257, 8, 1024, BF16, "paper", 0, False),
    ]
WIDE = ("layer_input", "streams", "u", "d x", "d f")
IDS = [f"{c[4]}-parts{c[5]}-n{c[1]}-{str(c[3])[6:]}{'-norm' * c[6]}{'-empty' * (not c[0])}" for c in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)
# Of what joins connections, by default one of each: both halves learned, one, none; four streams and three.
FEW = (1, 6, 9, 11, 15, 18, 21, 23)
by_default_few = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if k in FEW or ON_GPU else pytest.mark.slow)
        for k, (case, name) in enumerate(zip(CASES, IDS, strict=True))
    ],
)


def check(errors, dtype, factor=1.0):
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        assert value <= factor * (STREAM if name in WIDE else COEFFICIENT)[dtype], name


@each_case
def test_outputs_and_every_gradient_match_float64(case):
    check(errors_of(case), case[3])


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("arithmetic", FORMS)
@pytest.mark.parametrize("parts", range(8))
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_every_combination_matches_float64(n, parts, arithmetic, norm):
    check(errors_of((5, n, 32, F32, arithmetic, parts, norm)), F32)


@pytest.mark.parametrize("v4", [False, True])
def test_three_streams_stand_extreme_logits_and_twenty_iterations(v4):
    """What is beside the matrix in its tile neither grows nor turns to NaN."""
    options = Options(1e-6, 20, v4)
    for size in (1.0, 1e3):
        x, weight, affine, f = inputs(6, 3, 32, F32, ALL)
        affine[:15] *= size
        tensors, results = [x, weight, affine, f], []
        for exact in (True, False):
            leaves, _ = leaves_of(tensors, None, exact)
            read, streams, h = connection(*leaves, options, None, exact)
            (read.square().sum() + streams.square().sum()).backward()
            results.append((h.h_res, [leaf.grad for leaf in leaves]))
        (want_h, want), (got_h, got) = results
        assert error(got_h, want_h) <= (1e-5 if size == 1 else 1e-3)
        assert all(g.isfinite().all() for g in got)
        if size == 1:
            assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 1e-4


@by_default_few
def test_linked_connections_give_the_bits_of_unlinked_ones(monkeypatch, case):
    made, original = [], autograd.post_backward
    monkeypatch.setattr(autograd, "post_backward", lambda *args: (made.append(0), original(*args))[1])
    want = chain(case, "apart")
    assert len(made) == 3
    same(chain(case, "linked"), want)
    assert len(made) == (4 if case[0] else 6)  # the last one has its own


def test_a_writer_of_another_form_makes_its_own_df(monkeypatch):
    """As no model has it; the reader's kernel would take the writer's rows for its own."""
    x, *rest = inputs(5, 4, 48, F32, ALL)
    second, results = inputs(5, 4, 48, F32, READS + WRITES), []
    of_both = options_of("paper", ALL), options_of("hy_v4", READS + WRITES)
    for linked in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, *rest)]
        streams = leaves[0]
        for (weight, affine, f), options in zip((leaves[1:], second[1:]), of_both, strict=True):
            read, mappings = autograd.pre(streams, weight, affine, options)
            streams = autograd.post_res(f + read, mappings, linked=linked)
        results.append(torch.autograd.grad(streams.square().sum(), leaves))
    same(*results)


AHEADS = [c for c in CASES if c[3] == BF16 and c[1] < 8 and c[5] and c[0]]


@pytest.mark.parametrize("case", AHEADS, ids=[i for i, c in zip(IDS, CASES, strict=True) if c in AHEADS])
def test_a_chain_that_projects_ahead_matches_float64(monkeypatch, case):
    from megatron_mhc.ops.triton import pre

    made, original = [], pre._project
    monkeypatch.setattr(pre, "_project", lambda *args: (made.append(0), original(*args))[1])
    runs = (chain(case, how) for how in ("ahead", "apart", "exact"))
    for got, without, exact in zip(*runs, strict=True):
        assert error(got, exact) <= max(1.3 * error(without, exact), 1e-2)
    assert len(made) == 1 + 3


@pytest.mark.parametrize("parts", range(8))
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_projection_made_ahead_has_the_streams_of_post_res(n, parts):
    x, weight, _, f = inputs(5, n, 48, BF16, ALL)  # weight: of the next connection
    mappings = torch.rand(5, Form(parts).rows(n), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    f_bias = eighths(bias_like(f))
    out, made, _ = post_res_project(x, f, mappings, weight, f_bias, False, parts)
    assert torch.equal(out, post_res_forward(x, f, mappings, f_bias, parts=parts))
    exact = out.double().flatten(1)
    assert error(made[..., :-1].sum(0), exact @ weight.double().T) <= 2e-5
    assert error(made[..., -1].sum(0), exact.square().sum(1)) <= 1e-6


def two_connections(case, as_one_node):
    """Layer input, streams and gradients of two connections; post_res of the first with pre of the second."""
    tokens, n, channels, _, arithmetic, parts, wanted = case
    options = options_of(arithmetic, parts)
    tensors = inputs(tokens, n, channels, BF16, parts)
    leaves, norm = leaves_of(tensors, norm_for(tensors[-1], n, wanted), False)
    x, weight, affine, f = leaves[:4]
    f = f.view(tokens, 1, channels)
    _, mappings = autograd.pre(x.view(tokens, 1, -1), weight, affine, options, AHEAD, n, norm)
    next_pre = NextPre(AHEAD, weight, affine, options, norm)
    if as_one_node:
        streams = boundary.post_res_pre(f, mappings, next_pre)
    else:
        streams = autograd.post_res(f, mappings)
    made = boundary.taken(streams, weight, affine, norm=norm)
    assert (made is not None) == as_one_node
    read, mappings = made or autograd.pre(streams, weight, affine, options, AHEAD, n, norm)
    last = autograd.post_res(f, mappings)
    grads = torch.autograd.grad(
        [read, last], leaves, [noise(1, read, BF16), noise(2, last, BF16)], allow_unused=True
    )
    return [read, last, *(g for g in grads if g is not None and g.numel())]


@by_default_few
def test_one_node_has_the_bits_of_two(case):
    if case[0]:
        same(two_connections(case, True), two_connections(case, False))


@by_default_few
def test_the_ends_of_a_split_boundary_match_float64(case):
    """u and h_post leave, df and dh_post come back."""
    tokens, n, channels, dtype, arithmetic, parts, wanted = case
    options, tensors = options_of(arithmetic, parts), inputs(tokens, n, channels, dtype, parts)
    norm, results = norm_for(tensors[-1], n, wanted), []
    for exact in (True, False):
        leaves, of_norm = leaves_of(tensors, norm, exact)
        x, weight, affine, f = leaves[:4]
        if exact:
            h = exact_mappings(x, weight, affine, options)
            read, u, h_post = reference.pre(x, h.h_pre, of_norm), reference.mix(x, h.h_res), h.h_post
            streams = reference.write(u, f, h_post)
        else:
            read, mappings = autograd.pre(x, weight, affine, options, norm=of_norm)
            u, h_post = autograd.mix(mappings)
            assert u.data_ptr() != x.data_ptr() or not tokens  # the message outlives x
            streams = stage_ends.write(u, f, h_post)
        wide = torch.float64 if exact else dtype
        dl, dx = noise(1, read, dtype).to(wide), noise(2, streams, dtype).to(wide)
        dh_post = noise(4, h_post, h_post.dtype)
        backward = [(read, dl), (u, dx), (h_post, dh_post)]
        roots, grads = zip(*(pair for pair in backward if pair[0].requires_grad), strict=True)
        torch.autograd.backward(roots, grads)
        results.append((read, u, h_post, streams, [leaf.grad for leaf in (x, weight, affine)]))
    want, got = results
    names = ("layer_input", "u", "h_post", "streams")
    errors = {k: error(a, b) for k, a, b in zip(names, got, want, strict=False)}
    for name, a, b in zip(("d x", "d weight", "d affine"), got[-1], want[-1], strict=True):
        if b is not None and b.numel():
            errors[name] = error(a, b)
    check(errors, dtype, 2.0)  # the streams are rounded twice, as u and as x'


@pytest.mark.parametrize("behind", [False, True])
@by_default_few
def test_a_replay_has_the_bits_of_the_forward_pass(case, behind):
    tokens, n, channels, dtype, arithmetic, parts, wanted = case
    options, (x, weight, affine, f) = options_of(arithmetic, parts), inputs(*case[:4], parts)
    f, f_bias, norm = eighths(f), eighths(bias_like(f)), norm_for(f, n, wanted)
    streams, row, outputs = [x], [], []
    for k in range(replay.at_once(n)):
        this = norm if k != 1 else None
        y, _, mappings, norm_saved = pre_forward(streams[-1], weight * (k + 1), affine, options, norm=this)
        assert mappings.shape == (tokens, Form(parts).rows(n))
        out = torch.full_like(y, float("nan"))
        bias = f_bias if k == 0 else None
        row.append(replay.Connection(mappings, f, out, bias, this, norm_saved))
        outputs.append((out, y))
        streams.append(post_res_forward(streams[-1], f, mappings, bias, parts=parts))
    got = replay.replay(x, row, behind, parts)
    same(got, streams[1 : None if behind else -1])
    for out, y in outputs:
        assert torch.equal(out, y)


@pytest.mark.parametrize("parts, arithmetic", [(READS + WRITES, "hy_v4"), (MIXES, "paper"), (0, "paper")])
@apart
def test_compiled_operations_have_the_bits_of_eager_ones(parts, arithmetic):
    options = options_of(arithmetic, parts)
    tensors = inputs(5, 4, 48, F32, parts)
    norm = norm_for(tensors[-1], 4, True)

    def run(x, weight, affine, f, norm_weight):
        read, mappings = autograd.pre(x, weight, affine, options, norm=norm._replace(weight=norm_weight))
        return read, autograd.post_res(f + read, mappings)

    results = []
    for step in (optimize(run), run):
        leaves, _ = leaves_of(tensors, norm, False)
        read, streams = step(*leaves)
        total = (read * noise(1, read, F32)).sum() + (streams * noise(2, streams, F32)).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([read, streams, *(g for g in grads if g is not None and g.numel())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_fixed_part_has_no_rows():
    rows = {parts: Form(parts).rows(4) for parts in range(8)}
    assert rows == {0: 0, READS: 4, WRITES: 4, 3: 8, MIXES: 16, 5: 20, 6: 20, ALL: 24}
    for parts in range(8):
        x, weight, affine, f = inputs(5, 4, 48, F32, parts)
        options = options_of("paper", parts)
        _, saved, mappings, _ = pre_forward(x, weight, affine, options)
        assert saved.shape == (5, rows[parts] + 1) and mappings.shape == (5, rows[parts])
        _, d_weight, d_affine, *_ = pre_backward(x, x, f, f, weight, affine, saved, options)
        assert (0 if d_weight is None else len(d_weight)) == rows[parts] and d_affine.shape == affine.shape


def nothing(like):
    return torch.full_like(like, float("nan"))


def test_nothing_is_read_for_a_fixed_part():
    """What a learned one would read is NaN."""
    for parts in range(8):
        x, weight, affine, f = inputs(5, 4, 48, F32, parts)
        options, g = options_of("deepseek_v4", parts), noise(1, x, F32)
        _, saved, mappings, _ = pre_forward(x, weight, affine, options)
        if not parts & WRITES:
            assert post_backward(g, nothing(saved), nothing(affine), options.form).isfinite().all()
            dx, *rest = pre_backward(x, g, nothing(f), f, weight, affine, saved, options)
            assert all(t.isfinite().all() for t in (dx, *rest) if t is not None)
        turns = torch.empty(4, dtype=torch.int32, device=DEVICE)
        unread = dict(dl=f if parts & READS else nothing(f), g=g if parts & (WRITES + MIXES) else nothing(g))
        for dh_post in (None, f[:, :4].contiguous()):
            if dh_post is not None and not parts & MIXES:
                unread["g"] = nothing(g)
            d, again, partial = mapping_backward(
                x if parts & (READS + MIXES) else nothing(x),
                unread["g"],
                f,
                unread["dl"],
                affine,
                saved,
                turns,
                options,
                dh_post=dh_post,
            )
            assert d[:, : len(weight) + 1].isfinite().all() and partial.isfinite().all()
            assert again.isfinite().all() and not turns.any()
        if not parts:
            dx, *_ = pre_backward(nothing(x), g, f, f, weight, affine, saved, options)
            torch.testing.assert_close(dx, g + f[:, None] / 4)
            assert torch.equal(post_res_forward(x, f, mappings, parts=0), x + f[:, None])


def test_results_repeat_bit_for_bit():
    for parts, n in ((READS + WRITES, 4), (ALL, 3), (0, 4)):
        sizes = (2000, n, 1024) if ON_GPU else (9, n, 32)
        case = (*sizes, BF16, "hy_v4", parts, True)
        same(chain(case, "linked"), chain(case, "linked"))


COMPILED = [
    *((4, parts, "hy_v4", "bfloat16", True) for parts in range(8)),
    *((4, parts, "deepseek_v4", "bfloat16", False) for parts in range(8)),
    *((3, parts, "paper", "float32", False) for parts in (0, 3, 6, 7)),
    (3, 7, "deepseek_v4", "bfloat16", True),
    (8, 3, "hy_v4", "bfloat16", True),
    (2, 3, "paper", "float16", False),
]


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=() if form == COMPILED[3] else pytest.mark.slow) for form in COMPILED],
)
def test_kernels_compile_for_an_h100(form, tmp_path):
    """Triton's interpreter takes what its compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = Path(__file__).with_name("compile_child.py")
    done = subprocess.run(
        [sys.executable, child, *map(str, form)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"_aggregate_kernel", "_post_res_kernel", "_dx_kernel", "_replay_kernel"} <= set(
        done.stdout.split()
    )
