"""Every statistic against loops over Python floats (float64), on hand-made matrices and streams."""

import dataclasses
import math

import pytest
import torch
from diagnostics_cases import C, N, T, config_of, connections, random_samples

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Sampler, amax_gain, composite, statistics
from megatron_mhc.diagnostics.report import reduce_samples
from megatron_mhc.diagnostics.sampler import Sample


def matrices(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, N, N, generator=generator) for _ in range(count)]


def product(matrices_: list[list[list[float]]]) -> list[list[float]]:
    """M_last ... M_first of one token: stream i of the output from stream j of the input."""
    n = len(matrices_[0])
    result = [[float(i == j) for j in range(n)] for i in range(n)]
    for m in matrices_:
        result = [[sum(m[i][k] * result[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
    return result


def by_hand(h_res: list[torch.Tensor], token: int) -> list[list[float]]:
    return product([h[token].double().tolist() for h in h_res])


def forward_gain(m: list[list[float]]) -> float:
    return max(abs(sum(row)) for row in m)


def backward_gain(m: list[list[float]]) -> float:
    return max(abs(sum(column)) for column in zip(*m, strict=True))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_composite_matches_products_by_hand():
    h_res = matrices(6)
    expected = torch.tensor([by_hand(h_res, t) for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(composite(h_res), expected, rtol=1e-12, atol=1e-12)


def test_composite_is_what_the_streams_go_through():
    h_res, x = matrices(3), torch.randn(T, N, C, dtype=torch.float64)
    mixed = x
    for h in h_res:
        mixed = h.double() @ mixed
    torch.testing.assert_close(composite(h_res) @ x, mixed)


def test_composites_of_every_sublayer_match_products_by_hand():
    h_res = matrices(6)
    stack = torch.stack(h_res).double()
    from_input, to_output = statistics.composites_from_input(stack), statistics.composites_to_output(stack)
    for i in range(6):
        for t in range(T):
            before = torch.tensor(by_hand(h_res[: i + 1], t), dtype=torch.float64)
            after = torch.tensor(by_hand(h_res[i:], t), dtype=torch.float64)
            torch.testing.assert_close(from_input[i, t], before, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(to_output[i, t], after, rtol=1e-12, atol=1e-12)


def test_amax_gain_matches_sums_by_hand():
    (m,) = matrices(1)
    forward, backward = amax_gain(m.double())
    for t in range(T):
        rows = m[t].double().tolist()
        assert forward[t].item() == pytest.approx(forward_gain(rows))
        assert backward[t].item() == pytest.approx(backward_gain(rows))


def test_a_signed_matrix_keeps_the_absolute_value_outside_the_sum():
    forward, backward = amax_gain(torch.tensor([[1.0, -1.0], [-2.0, -1.0]]))
    assert (forward.item(), backward.item()) == (3.0, 2.0)


def test_sum_errors_of_a_matrix_whose_sums_are_known():
    m = torch.tensor([[0.5, 0.4], [0.75, 0.25]])  # rows 0.9 and 1, columns 1.25 and 0.65
    row, column = statistics.sum_errors(m.double())
    assert row.item() == pytest.approx(0.1) and column.item() == pytest.approx(0.35)


def geometry(x: list[list[float]]) -> tuple[float, float, float]:
    """Norm ratio, mean cosine and effective rank of the streams x: n lists of C numbers."""
    n = len(x)
    gram = [[sum(a * b for a, b in zip(x[i], x[j], strict=True)) for j in range(n)] for i in range(n)]
    norms = [math.sqrt(gram[i][i]) for i in range(n)]
    cosines = [gram[i][j] / norms[i] / norms[j] for i in range(n) for j in range(n) if i != j]
    trace, square = sum(gram[i][i] for i in range(n)), sum(g * g for row in gram for g in row)
    return max(norms) / min(norms), mean(cosines) if n > 1 else math.nan, trace**2 / square


def test_stream_geometry_matches_loops_by_hand():
    x = torch.randn(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = x @ x.transpose(1, 2)
    for t in range(T):
        ratio, cosine, rank = geometry(x[t].tolist())
        assert statistics.norm_ratio(gram)[t].item() == pytest.approx(ratio, rel=1e-12)
        assert statistics.mean_cosine(gram)[t].item() == pytest.approx(cosine, rel=1e-12)
        assert statistics.effective_rank(gram)[t].item() == pytest.approx(rank, rel=1e-12)


def test_parallel_and_orthogonal_streams_have_rank_one_and_n():
    parallel = torch.outer(torch.tensor([1.0, 2.0, 4.0]), torch.ones(6)).double()
    gram = parallel @ parallel.T
    assert statistics.effective_rank(gram).item() == pytest.approx(1)
    assert statistics.mean_cosine(gram).item() == pytest.approx(1)
    assert statistics.norm_ratio(gram).item() == pytest.approx(4)
    gram = torch.eye(3, dtype=torch.float64)
    assert statistics.effective_rank(gram).item() == pytest.approx(3)
    assert statistics.mean_cosine(gram).item() == 0


def report_by_hand(samples: dict[int, Sample], streams: list[torch.Tensor]) -> dict[str, list[float]]:
    """Every statistic of a Report, by loops over tokens."""
    h_res = [samples[i].h_res for i in sorted(samples)]
    tokens = range(h_res[0].shape[0])
    expected: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        expected.setdefault(name, []).append(value)

    for i in sorted(samples):
        single = [by_hand([h_res[i]], t) for t in tokens]
        add("gain_forward", mean(map(forward_gain, single)))
        add("gain_backward", mean(map(backward_gain, single)))
        add("composite_gain_forward", mean(forward_gain(by_hand(h_res[: i + 1], t)) for t in tokens))
        add("composite_gain_backward", mean(backward_gain(by_hand(h_res[i:], t)) for t in tokens))
        add("row_error", max(abs(sum(row) - 1) for m in single for row in m))
        add("column_error", max(abs(sum(column) - 1) for m in single for column in zip(*m, strict=True)))
        shapes = [geometry(streams[i][t].tolist()) for t in tokens]
        for k, name in enumerate(("norm_ratio", "cosine", "effective_rank")):
            add(name, mean(shape[k] for shape in shapes))
        for name in ("h_pre", "h_post"):
            values = getattr(samples[i], name).flatten().tolist()
            add(name + "_mean", mean(values))
            add(name + "_std", math.sqrt(mean((v - mean(values)) ** 2 for v in values)))
        for part, logits in samples[i].logits.items():
            add(f"logit_{part}_min", min(logits.flatten().tolist()))
            add(f"logit_{part}_max", max(logits.flatten().tolist()))
            add(f"alpha_{part}", samples[i].alphas[part].item())
    return expected


@pytest.mark.parametrize("capacity", [T, T + 3], ids=["full", "room_left"])
def test_every_statistic_of_a_report_matches_loops_by_hand(capacity):
    samples, streams = random_samples(layers=3)
    mhc = MHCConfig()
    report = reduce_samples(samples, config_of(mhc, layers=3), mhc, capacity)
    expected = report_by_hand(samples, streams)
    assert report.statistics.keys() == expected.keys()
    for name, values in expected.items():
        assert report.statistics[name] == pytest.approx(values, rel=1e-11, abs=1e-13), name
    for i in range(6):
        tokens = [by_hand([samples[k].h_res for k in range(i + 1)], t) for t in range(T)]
        for a in range(N):
            for b in range(N):
                assert report.h_res[i][a][b] == pytest.approx(mean(samples[i].h_res[:, a, b].tolist()))
                assert report.composite[i][a][b] == pytest.approx(mean(m[a][b] for m in tokens))


def test_a_product_of_averages_is_not_what_is_reported():
    """Tokens with gains 4 and 1/4 in alternation have composite gain 1; their averages' product 4.5."""
    h = torch.stack([torch.stack([4 * torch.eye(2), torch.eye(2) / 4])] * 2).double()
    h[1] = h[1].flip(0)
    samples, _ = random_samples(1, tokens=2, n=2)
    samples = {i: dataclasses.replace(samples[i], h_res=h[i]) for i in range(2)}
    mhc = MHCConfig(num_residual_streams=2)
    report = reduce_samples(samples, config_of(mhc), mhc, 2)
    assert report.statistics["composite_gain_forward"] == pytest.approx([2.125, 1.0])
    assert report.statistics["composite_gain_backward"] == pytest.approx([1.0, 2.125])


@pytest.mark.parametrize(
    "options, missing",
    [
        (dict(h_res="identity"), {"alpha_res", "logit_res_min", "logit_res_max"}),
        (dict(h_pre="fixed"), {"alpha_pre", "logit_pre_min", "logit_pre_max"}),
        (dict(num_residual_streams=1), {"cosine"}),
        (dict(h_res="identity", h_pre="fixed", h_post="fixed", num_residual_streams=2), None),
        (dict(h_res="unconstrained"), set()),
        (dict(preset="deepseek_v4"), set()),
        (dict(preset="glm_5_3"), set()),
        (dict(preset="hy_v4"), {"alpha_res", "logit_res_min", "logit_res_max"}),
    ],
)
def test_statistics_of_fixed_parts_are_left_out(options, missing):
    mhc = MHCConfig(**options)
    config = config_of(mhc)
    modules = connections(2, mhc)
    with torch.no_grad(), Sampler(modules, config) as sampler:
        for module in modules:
            module(torch.randn(T, 1, mhc.num_residual_streams * C))
    report = sampler.report()
    full = set(report_by_hand(*random_samples(1)))
    if missing is None:
        missing = {name for name in full if name.startswith(("alpha", "logit"))}
    assert report.statistics.keys() == full - missing
    assert all(math.isfinite(v) for values in report.statistics.values() for v in values)
