"""The reference operations against the paper's and DeepSeek-V4's formulas, written out in scalar loops."""

import math

import pytest
import torch

from megatron_mhc.ops import reference

STREAMS = [1, 2, 3, 4, 8]


def rand(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def sinkhorn_by_hand(logits, iterations):
    """Eq. (9) for one matrix of floats: divide each column by its sum, then each row."""
    n = len(logits)
    m = [[math.exp(logits[i][j]) for j in range(n)] for i in range(n)]
    for _ in range(iterations):
        for j in range(n):
            total = sum(m[i][j] for i in range(n))
            for i in range(n):
                m[i][j] /= total
        for i in range(n):
            total = sum(m[i])
            m[i] = [value / total for value in m[i]]
    return m


def comb_by_hand(logits, iterations, eps):
    """DeepSeek-V4's comb for one matrix: softmax of rows + eps, columns, then 19 x (rows, columns)."""
    n = len(logits)
    m = []
    for row in logits:
        top = max(row)
        exps = [math.exp(value - top) for value in row]
        m.append([value / sum(exps) + eps for value in exps])

    def columns():
        for j in range(n):
            total = sum(m[i][j] for i in range(n)) + eps
            for i in range(n):
                m[i][j] /= total

    def rows():
        for i in range(n):
            total = sum(m[i]) + eps
            m[i] = [value / total for value in m[i]]

    columns()
    for _ in range(iterations - 1):
        rows()
        columns()
    return m


@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_matches_divisions_by_hand(n):
    logits = rand(5, n, n, scale=3.0)
    got = reference.sinkhorn(logits, 20)
    for t in range(5):
        want = torch.tensor(sinkhorn_by_hand(logits[t].tolist(), 20), dtype=torch.float64)
        torch.testing.assert_close(got[t], want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4])
def test_sinkhorn_rows_sum_to_one_for_any_logits(n, scale):
    logits = (torch.rand(64, n, n, generator=torch.Generator().manual_seed(1)) * 2 - 1) * scale
    h_res = reference.sinkhorn(logits, 20)
    assert (h_res.sum(-1) - 1).abs().max() <= 1e-6
    assert (h_res >= 0).all()
    column_error = (h_res.sum(-2) - 1).abs().max().item()
    print(f"n={n} logits +-{scale:g}: column error {column_error:.1e}")  # shown by pytest -rP
    if scale <= 1.0:
        assert column_error <= 1e-5


def test_sinkhorn_keeps_a_row_that_underflows():
    logits = torch.tensor([[0.0, 0.0], [-1e4, -1e4]])
    torch.testing.assert_close(reference.sinkhorn(logits, 20), torch.full((2, 2), 0.5))


def test_sinkhorn_of_large_logits_matches_divisions_by_hand():
    # +-300 is what plain exponentials and divisions in float64 still survive.
    logits = (
        torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    ) * 300
    got = reference.sinkhorn(logits, 20)
    for t in range(8):
        want = torch.tensor(sinkhorn_by_hand(logits[t].tolist(), 20), dtype=torch.float64)
        torch.testing.assert_close(got[t], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_sinkhorn_in_float32_matches_float64(scale):
    # Rounding logits of this size to fp32 alone moves an entry by up to scale * 6e-8.
    logits = (torch.rand(64, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1) * scale
    error = (reference.sinkhorn(logits, 20) - reference.sinkhorn(logits.double(), 20)).abs().max()
    assert error <= 1e-6 + scale * 1.2e-7


def test_sinkhorn_gradient_matches_finite_differences():
    logits = rand(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.sinkhorn(z, 20), (logits,))
    big = (rand(2, 3, 3) * 1e4).requires_grad_()
    reference.sinkhorn(big, 20).square().sum().backward()
    assert big.grad.isfinite().all()


@pytest.mark.parametrize("n", STREAMS)
def test_deepseek_comb_matches_divisions_by_hand(n):
    logits = rand(4, n, n, scale=2.0)
    got = reference.sinkhorn_deepseek_v4(logits, 20)
    for t in range(4):
        want = torch.tensor(comb_by_hand(logits[t].tolist(), 20, 1e-6), dtype=torch.float64)
        torch.testing.assert_close(got[t], want, rtol=1e-12, atol=1e-14)


def test_deepseek_comb_without_eps_is_the_transposed_paper_projection():
    logits = rand(6, 4, 4)
    comb = reference.sinkhorn_deepseek_v4(logits, 20, eps=0.0)
    h_res = reference.sinkhorn(logits.transpose(-1, -2), 20)
    torch.testing.assert_close(comb.transpose(-1, -2), h_res, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", STREAMS)
def test_projection_matches_equations_14_to_16(n):
    tokens, width, m = 3, 5, n * n + 2 * n
    x, weight = rand(tokens, n, width), rand(m, n * width, seed=1)
    got = reference.normalised_projection(x, weight, 1e-6)
    for t in range(tokens):
        flat = x[t].flatten().tolist()
        r = math.sqrt(sum(v * v for v in flat) / len(flat) + 1e-6)
        for k in range(m):
            want = sum(v * w for v, w in zip(flat, weight[k].tolist(), strict=True)) / r
            assert got[t, k].item() == pytest.approx(want, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("fixed", [None, 0, 1, 2])
def test_logits_match_equation_16(n, fixed):
    """alpha * projection + bias; rows of a fixed part (pre, post or res) are absent."""
    alphas = [torch.tensor([a], dtype=torch.float64) for a in (0.3, 0.5, 0.7)]
    sizes = [n, n, n * n]
    if fixed is not None:
        alphas[fixed], sizes[fixed] = None, 0
    rows = sum(sizes)
    x, weight, bias = rand(3, n, 5), rand(rows, n * 5, seed=1), rand(rows, seed=2)
    got = reference.mapping_logits(x, weight, tuple(alphas), bias, 1e-6)
    projection = reference.normalised_projection(x, weight, 1e-6)
    row = 0
    for alpha, size in zip(alphas, sizes, strict=True):
        for _ in range(size):
            for t in range(3):
                want = alpha.item() * projection[t, row].item() + bias[row].item()
                assert got[t, row].item() == pytest.approx(want, rel=1e-13, abs=1e-14)
            row += 1
    assert got.shape == (3, row)


@pytest.mark.parametrize("n", STREAMS)
def test_mappings_match_equations_17_to_19(n):
    logits = rand(3, n * n + 2 * n)
    h_pre, h_post, h_res = reference.mhc_mappings(logits, n)
    for t in range(3):
        row = logits[t].tolist()
        sigmoid = [1 / (1 + math.exp(-v)) for v in row]
        assert h_pre[t].tolist() == pytest.approx(sigmoid[:n])
        assert h_post[t].tolist() == pytest.approx([2 * v for v in sigmoid[n : 2 * n]])
        matrix = [row[2 * n + i * n : 2 * n + (i + 1) * n] for i in range(n)]
        want = torch.tensor(sinkhorn_by_hand(matrix, 20), dtype=torch.float64)
        torch.testing.assert_close(h_res[t], want)


@pytest.mark.parametrize("n", STREAMS)
def test_one_connection_matches_the_papers_formula(n):
    """x'_i = sum_j H_res[i][j] x_j + h_post_i f, with l = sum_j h_pre_j x_j; rows of H_res are outputs."""
    tokens, width = 3, 4
    x, f, logits = rand(tokens, n, width), rand(tokens, width, seed=1), rand(tokens, n * n + 2 * n, seed=2)
    h = reference.mhc_mappings(logits, n)
    layer_input, out = reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res)
    for t in range(tokens):
        matrix = [logits[t, 2 * n + i * n : 2 * n + (i + 1) * n].tolist() for i in range(n)]
        h_res = sinkhorn_by_hand(matrix, 20)
        for c in range(width):
            read = sum(h.h_pre[t, j].item() * x[t, j, c].item() for j in range(n))
            assert layer_input[t, c].item() == pytest.approx(read)
            for i in range(n):
                mixed = sum(h_res[i][j] * x[t, j, c].item() for j in range(n))
                want = mixed + h.h_post[t, i].item() * f[t, c].item()
                assert out[t, i, c].item() == pytest.approx(want)


@pytest.mark.parametrize("n", STREAMS)
def test_one_connection_matches_deepseek_v4s_formula(n):
    """out[k] = post[k] f + sum_j comb[j][k] x[j]; pre has eps, post has none."""
    tokens, width, eps = 3, 4, 1e-6
    x, f, logits = rand(tokens, n, width), rand(tokens, width, seed=1), rand(tokens, n * n + 2 * n, seed=2)
    h = reference.mhc_mappings(logits, n, deepseek_v4=True)
    layer_input, out = reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res)
    for t in range(tokens):
        row = logits[t].tolist()
        sigmoid = [1 / (1 + math.exp(-v)) for v in row]
        comb = comb_by_hand([row[2 * n + i * n : 2 * n + (i + 1) * n] for i in range(n)], 20, eps)
        for c in range(width):
            read = sum((sigmoid[j] + eps) * x[t, j, c].item() for j in range(n))
            assert layer_input[t, c].item() == pytest.approx(read)
            for k in range(n):
                want = 2 * sigmoid[n + k] * f[t, c].item()
                want += sum(comb[j][k] * x[t, j, c].item() for j in range(n))
                assert out[t, k, c].item() == pytest.approx(want)


@pytest.mark.parametrize("n", STREAMS)
def test_one_connection_matches_hy_v4s_formula(n):
    """out[k] = post[k] f + x[k]; pre = sigmoid + eps, post = magnitude sigmoid + eps."""
    tokens, width, eps, magnitude = 3, 4, 1e-6, 1.5
    x, f, logits = rand(tokens, n, width), rand(tokens, width, seed=1), rand(tokens, 2 * n, seed=2)
    more = dict(deepseek_v4=True, dynamic_res=False, post_magnitude=magnitude, post_eps=eps)
    h = reference.mhc_mappings(logits, n, **more)
    layer_input, out = reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res)
    for t in range(tokens):
        sigmoid = [1 / (1 + math.exp(-v)) for v in logits[t].tolist()]
        for c in range(width):
            read = sum((sigmoid[j] + eps) * x[t, j, c].item() for j in range(n))
            assert layer_input[t, c].item() == pytest.approx(read, rel=1e-10)
            for k in range(n):
                want = (magnitude * sigmoid[n + k] + eps) * f[t, c].item() + x[t, k, c].item()
                assert out[t, k, c].item() == pytest.approx(want, rel=1e-10)


def test_the_two_orientations_differ():
    """Guards the tests above: with H transposed they could not all pass."""
    x, f, logits = rand(2, 3, 4), rand(2, 4, seed=1), rand(2, 15, seed=2)
    h = reference.mhc_mappings(logits, 3)
    right = reference.post_res(x, f, h.h_post, h.h_res)
    wrong = reference.post_res(x, f, h.h_post, h.h_res.transpose(-1, -2))
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("n", STREAMS)
def test_hyper_connections_match_equation_5(n):
    """H_pre_j = a tanh(theta_pre . x~_j) + b, H_res_ij = a tanh(theta_res_i . x~_j) + b, x~ per stream."""
    tokens, width = 2, 5
    x, weight, bias = rand(tokens, n, width), rand(n + 2, width, seed=1), rand(n * n + 2 * n, seed=2)
    alphas = tuple(torch.tensor([a], dtype=torch.float64) for a in (0.3, 0.5, 0.7))
    h_pre, h_post, h_res = reference.hc_mappings(x, weight, alphas, bias, 1e-6)
    for t in range(tokens):
        for j in range(n):
            stream = x[t, j].tolist()
            r = math.sqrt(sum(v * v for v in stream) / width + 1e-6)

            def theta(k, stream=stream, r=r):
                return math.tanh(sum(v / r * w for v, w in zip(stream, weight[k].tolist(), strict=True)))

            assert h_pre[t, j].item() == pytest.approx(0.3 * theta(0) + bias[j].item())
            assert h_post[t, j].item() == pytest.approx(0.5 * theta(1) + bias[n + j].item())
            for i in range(n):
                want = 0.7 * theta(2 + i) + bias[2 * n + i * n + j].item()
                assert h_res[t, i, j].item() == pytest.approx(want)


def test_fixed_parts_are_the_papers_constants():
    logits = rand(2, 16)
    h = reference.mhc_mappings(logits, 4, dynamic_pre=False, dynamic_post=False)
    assert (h.h_pre == 0.25).all() and (h.h_post == 1).all()
    h = reference.mhc_mappings(logits[:, :8], 4, dynamic_res=False)
    assert (h.h_res == torch.eye(4)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_streams_keep_their_dtype_and_coefficients_theirs(dtype, tokens):
    n, width = 4, 6
    x = rand(tokens, n, width, dtype=dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    logits = reference.normalised_projection(x, rand(24, n * width, dtype=torch.float32), 1e-6)
    h = reference.mhc_mappings(logits, n)
    assert {t.dtype for t in h} == {want}
    assert reference.pre(x, h.h_pre).dtype == dtype
    out = reference.post_res(x, rand(tokens, width, dtype=dtype), h.h_post, h.h_res)
    assert out.dtype == dtype and out.shape == x.shape
    assert reference.contract(x, "mean").dtype == dtype


def test_every_gradient_matches_finite_differences():
    n, tokens, width = 3, 2, 4
    args = [
        rand(tokens, n, width),
        rand(n * n + 2 * n, n * width, seed=1),
        rand(n * n + 2 * n, seed=2),
        rand(n * n + 2 * n, seed=3),
        rand(tokens, width, seed=4),
    ]
    args = [a.requires_grad_() for a in args]

    def connection(x, weight, gates, bias, f):
        logits = reference.normalised_projection(x, weight, 1e-6) * gates + bias
        h = reference.mhc_mappings(logits, n)
        return reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res)

    assert torch.autograd.gradcheck(connection, args)


def test_expand_then_contract_is_the_identity():
    hidden = rand(3, 2, 5)
    streams = reference.expand(hidden, 4)
    assert streams.shape == (3, 2, 20)
    x = streams.view(6, 4, 5)
    assert all(torch.equal(x[:, i], hidden.view(6, 5)) for i in range(4))
    torch.testing.assert_close(reference.contract(x, "mean"), hidden.view(6, 5))
    torch.testing.assert_close(reference.contract(x, "sum"), 4 * hidden.view(6, 5))


def test_learned_head_matches_deepseek_v4s_formula():
    tokens, n, width = 2, 4, 3
    x, weight, bias = rand(tokens, n, width), rand(n, n * width, seed=1), rand(n, seed=2)
    alpha = torch.tensor([0.4], dtype=torch.float64)
    got = reference.learned_head(x, weight, alpha, bias, norm_eps=1e-6, deepseek_v4=True)
    for t in range(tokens):
        flat = x[t].flatten()
        logits = (weight @ flat) / math.sqrt(flat.square().mean().item() + 1e-6)
        weights = torch.sigmoid(logits * 0.4 + bias) + 1e-6
        torch.testing.assert_close(got[t], weights @ x[t])


@pytest.mark.parametrize("around", ["forward", "forward and backward"])
@pytest.mark.parametrize("streams", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mhc", "hc", "head", "sum", "mean", "split"])
def test_autocast_changes_neither_results_nor_gradients(name, streams, around):
    n, width = 4, 6
    wide = torch.float64 if streams == torch.float64 else torch.float32
    x, f = rand(7, n, width, dtype=streams), rand(7, width, seed=1, dtype=streams)
    phi, bias = rand(24, n * width, seed=2, dtype=wide), rand(24, seed=3, dtype=wide)
    alphas = tuple(rand(3, seed=4, dtype=wide).split(1))

    def run(x, f, phi, bias, *alphas):
        if name in ("sum", "mean"):
            return [reference.contract(x, name)]
        if name == "head":
            head = dict(norm_eps=1e-6, deepseek_v4=False)
            return [reference.learned_head(x, phi[:n], alphas[0], bias[:n], **head)]
        if name == "hc":
            h = reference.hc_mappings(x, phi[: n + 2, :width], alphas, bias, 1e-6)
        else:
            h = reference.mhc_mappings(reference.mapping_logits(x, phi, alphas, bias, 1e-6), n)
        if name == "split":
            u = reference.mix(x, h.h_res)
            return [u, reference.write(u, f, h.h_post), *reference.write_backward(x, f, h.h_post)]
        return [*h, reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res)]

    def results(forward, backward):
        leaves = [t.clone().requires_grad_() for t in (x, f, phi, bias, *alphas)]
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            outputs = run(*leaves)
        grads = [rand(*o.shape, seed=5, dtype=o.dtype) for o in outputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            return outputs + list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))

    for got, want in zip(results(True, around != "forward"), results(False, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_streams_keep_their_dtype_whatever_that_of_f():
    h = reference.mhc_mappings(rand(7, 24, dtype=torch.float32), 4)
    x, f = rand(7, 4, 6, dtype=torch.float32), rand(7, 6, dtype=torch.bfloat16)
    assert reference.post_res(x, f, h.h_post, h.h_res).dtype == torch.float32
    assert reference.post_res(x.bfloat16(), f.float(), h.h_post, h.h_res).dtype == torch.bfloat16
