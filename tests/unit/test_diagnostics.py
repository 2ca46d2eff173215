"""Every statistic against loops over Python floats (float64), on hand-made matrices and streams."""

import dataclasses
import json
import math
import re

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Sampler, amax_gain, capture_h_res, composite, statistics
from megatron_mhc.diagnostics.report import Report, reduce_samples, sublayer_name
from megatron_mhc.diagnostics.sampler import Sample
from megatron_mhc.diagnostics.training import check_writers, out_of_range, sample_steps, scalars, write
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import reference

T, N, C = 5, 4, 8


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


def config_of(mhc: MHCConfig, layers: int = 1, **settings) -> TransformerConfig:
    config = TransformerConfig(
        num_layers=layers, hidden_size=C, num_attention_heads=1, use_cpu_initialization=True, **settings
    )
    config.mhc = mhc
    return config


def random_samples(layers: int, tokens: int = T, n: int = N) -> tuple[dict[int, Sample], list[torch.Tensor]]:
    """Samples of 2 * layers sub-layers, and the streams that each read."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    samples, streams = {}, []
    for i in range(2 * layers):
        x = randn(tokens, n, C)
        parts = {"pre": n, "post": n, "res": n * n}
        samples[i] = Sample(
            randn(tokens, n),
            randn(tokens, n),
            randn(tokens, n, n),
            x @ x.transpose(1, 2),
            {part: randn(tokens, size) for part, size in parts.items()},
            {part: randn(1) for part in parts},
        )
        streams.append(x)
    return samples, streams


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


def connections(count: int, mhc: MHCConfig | None = None) -> nn.ModuleList:
    mhc = mhc or MHCConfig(num_residual_streams=N, init_gating_factor=1.0)
    torch.manual_seed(1)
    modules = nn.ModuleList(HyperConnectionModule(config_of(mhc), mhc, i) for i in range(count))
    for module in modules:
        if hasattr(module, "mapping_proj"):
            nn.init.normal_(module.mapping_proj.weight)
    return modules


def test_captured_mappings_match_the_coefficients_in_order():
    modules = connections(3)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad():
        expected = [module(streams)[1].h_res for module in modules]
        with capture_h_res(modules) as captured:
            for module in modules:
                module(streams)
        modules[0](streams)  # after the block: not collected
    assert len(captured) == 3
    for got, want in zip(captured, expected, strict=True):
        assert got.shape == (T, N, N)
        assert torch.equal(got, want)
    forward, _ = amax_gain(composite(captured))
    torch.testing.assert_close(forward, torch.ones_like(forward), rtol=0, atol=1e-5)


def test_a_list_of_chunks_is_captured_like_one_model():
    modules = connections(2)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad(), capture_h_res([modules[0], modules[1]]) as captured:
        modules[1](streams)
        modules[0](streams)
    assert len(captured) == 2


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_samples_match_the_connection_and_its_streams(preset):
    mhc = MHCConfig(preset=preset, init_gating_factor=1.0)
    modules = connections(2, mhc)
    streams = torch.randn(6, 2, N * C)
    with Sampler(modules, config_of(mhc), tokens=4) as sampler:
        for module in modules:
            _, mappings = module(streams)
    every = [0, 3, 6, 9]  # 4 of 12 tokens, evenly spaced
    sample, x = sampler.samples[1], streams.view(12, N, C)[every].double()
    for name in ("h_pre", "h_post", "h_res"):
        got = getattr(sample, name)
        assert not got.requires_grad
        assert torch.equal(got, getattr(mappings, name)[every].double()), name
    torch.testing.assert_close(sample.gram, x @ x.transpose(1, 2), rtol=1e-12, atol=0)
    # The logits are what the sigmoids and Sinkhorn got: they give the mappings.
    v4 = preset == "deepseek_v4"
    logits = torch.cat([sample.logits[part] for part in ("pre", "post", "res")], dim=1).double()
    again = reference.mhc_mappings(logits, N, deepseek_v4=v4)
    for name in ("h_pre", "h_post", "h_res"):
        torch.testing.assert_close(getattr(again, name), getattr(sample, name), rtol=1e-5, atol=1e-6)


def test_samples_of_the_triton_path_match_the_reference():
    pytest.importorskip("triton")
    taken = {}
    for backend in ("reference", "triton"):
        mhc = MHCConfig(backend=backend, init_gating_factor=1.0)
        torch.manual_seed(3)
        config = config_of(mhc)
        config.hidden_size = 16
        module = HyperConnectionModule(config, mhc, 0)
        nn.init.normal_(module.mapping_proj.weight)
        streams = torch.randn(T, 1, N * 16)
        with torch.no_grad(), Sampler(module, config) as sampler:
            module(streams)
        taken[backend] = sampler.samples[0]
    got, want = taken["triton"], taken["reference"]
    for name in ("h_pre", "h_post", "h_res", "gram"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    assert got.logits.keys() == want.logits.keys() == {"pre", "post", "res"}
    for part in got.logits:
        torch.testing.assert_close(got.logits[part], want.logits[part], rtol=1e-5, atol=1e-5)


def test_only_the_first_call_is_sampled_and_no_hook_stays():
    modules = connections(2)
    mhc = modules[0].mhc
    first, second = torch.randn(2, T, 1, N * C).unbind(0)
    with torch.no_grad():
        expected = [module(first)[1].h_res for module in modules]
        assert not any(module._forward_hooks for module in modules)
        with Sampler(modules, config_of(mhc)) as sampler:
            for streams in (first, second):
                for module in modules:
                    module(streams)
        assert not any(module._forward_hooks for module in modules)
    for i in range(2):
        assert torch.equal(sampler.samples[i].h_res, expected[i].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_copies(dtype):
    """Block recomputation empties mappings before the step ends, and the optimizer changes parameters."""
    mhc = MHCConfig(init_gating_factor=1.0, backend="reference")
    module = HyperConnectionModule(config_of(mhc, params_dtype=dtype), mhc, 0)
    streams = torch.randn(T, 1, N * C, dtype=dtype)
    with Sampler(module, config_of(mhc)) as sampler:
        _, mappings = module(streams)
    before = mappings.h_res.detach().clone().double()
    with torch.no_grad():
        for tensor in (streams, *mappings, *module.parameters()):
            tensor.zero_()
    sample = sampler.samples[0]
    assert torch.equal(sample.h_res, before) and sample.alphas["res"].item() == 1.0
    assert sample.h_pre.abs().min() > 0 and sample.gram.abs().max() > 0


def test_hooks_are_removed_when_the_step_fails():
    modules = connections(1)
    with pytest.raises(RuntimeError, match="step"), Sampler(modules, config_of(modules[0].mhc)):
        assert modules[0]._forward_hooks
        raise RuntimeError("step")
    assert not modules[0]._forward_hooks


def test_a_model_without_mhc_is_refused():
    with pytest.raises(ValueError, match="no mHC connections"), capture_h_res(nn.Linear(2, 2)):
        pass
    plain = TransformerConfig(num_layers=1, hidden_size=C, num_attention_heads=1)
    with pytest.raises(ValueError, match="has no mHC"):
        Sampler(nn.Linear(2, 2), plain)


def test_a_sublayer_that_did_not_run_is_named():
    modules = connections(2)
    with Sampler(modules, config_of(modules[0].mhc)) as sampler:
        modules[0](torch.randn(T, 1, N * C))
    with pytest.raises(ValueError, match=r"\[1\] did not run"):
        sampler.report()
    samples, _ = random_samples(1)
    with pytest.raises(ValueError, match="layer_002_attention, layer_002_mlp"):
        reduce_samples(samples, config_of(MHCConfig(), layers=2), MHCConfig(), T)


def test_composite_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        composite([])


def fake_report(**changes: list[float]) -> Report:
    samples, _ = random_samples(2)
    report = reduce_samples(samples, config_of(MHCConfig(), layers=2), MHCConfig(), T)
    values = {name: [1.0] * 4 if "gain" in name else [0.0] * 4 for name in report.statistics}
    return dataclasses.replace(report, statistics=values | changes)


def test_scalars_name_each_sublayer_and_the_worst():
    report = fake_report(composite_gain_forward=[1.0, 7.0, 2.0, 3.0], effective_rank=[3.0, 2.0, 1.5, 4.0])
    named = scalars(report)
    assert named["mhc/composite_gain_forward/layer_001_attention"] == 1.0
    assert named["mhc/composite_gain_forward/layer_001_mlp"] == 7.0
    assert named["mhc/composite_gain_forward/layer_002_mlp"] == 3.0
    assert named["mhc/composite_gain_forward"] == 7.0
    assert named["mhc/effective_rank"] == 1.5
    assert "mhc/alpha_pre" not in named and "mhc/alpha_pre/layer_002_attention" in named
    broken = scalars(fake_report(gain_forward=[1.0, math.nan, 2.0, 1.0]))
    assert math.isnan(broken["mhc/gain_forward"])


ALARM = MHCConfig(log_interval=1, alarm="warn", alarm_gain=5.0, alarm_logit=20.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(composite_gain_forward=[1, 6, 9, 2]), "composite_gain_forward 9 of layer_002_attention.*2 sub"),
        (dict(composite_gain_backward=[0.1, 1, 1, 1]), "composite_gain_backward 0.1 of layer_001_attention"),
        (dict(gain_backward=[1, 1, 1, math.nan]), "gain_backward nan of layer_002_mlp"),
        (dict(gain_forward=[1, 1, 0, 1]), "gain_forward 0 of layer_002_attention.*alarm-gain"),
        (dict(logit_res_min=[0, -21, 0, 0]), "logit_res_min -21 of layer_001_mlp.*alarm-logit"),
        (dict(logit_pre_max=[0, 0, math.inf, 0]), "logit_pre_max inf of layer_002_attention"),
    ],
)
def test_alarm_names_the_worst_layer_once(changes, words):
    raised: set[str] = set()
    (message,) = out_of_range(fake_report(**changes), ALARM, raised)
    assert re.search(words, message), message
    assert out_of_range(fake_report(**changes), ALARM, raised) == []  # said once


def test_alarm_is_silent_inside_its_ranges_and_when_off():
    inside = fake_report(composite_gain_forward=[0.2, 5.0, 1, 1], logit_res_max=[20.0] * 4)
    assert out_of_range(inside, ALARM, set()) == []
    outside = fake_report(composite_gain_forward=[100.0] * 4)
    assert out_of_range(outside, MHCConfig(log_interval=1), set()) == []
    both = fake_report(composite_gain_forward=[100.0] * 4, logit_res_max=[99.0] * 4)
    assert len(out_of_range(both, ALARM, set())) == 2  # a gain and a logit


class FakeWriter:
    def __init__(self):
        self.scalars, self.tensors, self.logged = {}, {}, {}

    def add_scalar(self, name, value, step):
        self.scalars[step, name] = value

    def add_tensor(self, name, value, step):
        self.tensors[step, name] = value

    def log(self, values, step):
        self.logged[step] = values


def run_steps(monkeypatch, mhc: MHCConfig, steps: int):
    """Steps of a two-connection model under `sample_steps`: the writers and, per step, whether hooks were
    there and what the step returned."""
    import megatron.training

    tensorboard, wandb = FakeWriter(), FakeWriter()
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: wandb)
    modules = connections(2, mhc)
    config, seen = config_of(mhc), []

    def train_step(forward, data, model, optimizer, scheduler, config, schedule, iteration=None, **groups):
        assert groups == {"pg_collection": "groups"}
        seen.append(any(m._forward_hooks for m in model.modules()))
        with torch.no_grad():
            for module in model:
                module(torch.randn(T, 1, N * C))
        return {"lm loss": 1.0}, 0, False, False, 0, 1.0, 0, 0

    step = sample_steps(train_step)
    results = [
        step("f", "d", modules, "o", "s", config, "b", iteration=i, pg_collection="groups")
        for i in range(steps)
    ]
    assert not any(m._forward_hooks for m in modules.modules())
    return tensorboard, wandb, seen, results


def test_every_kth_step_is_sampled_and_written(monkeypatch):
    tensorboard, wandb, seen, results = run_steps(monkeypatch, MHCConfig(log_interval=3), 7)
    assert seen == [False, False, True, False, False, True, False]
    assert {step for step, _ in tensorboard.scalars} == set(wandb.logged) == {3, 6}
    assert wandb.logged[3] == {name: v for (step, name), v in tensorboard.scalars.items() if step == 3}
    assert tensorboard.tensors[6, "mhc/h_res"].shape == (2, N, N)
    assert all(name.startswith("mhc/") for _, name in tensorboard.scalars)
    assert all(result[:4] == ({"lm loss": 1.0}, 0, False, False) for result in results)


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util
    from torch.utils.tensorboard import SummaryWriter

    report = fake_report(gain_forward=[1.0, 2.0, math.inf, 0.5])
    writer = SummaryWriter(str(tmp_path))
    write(report, 7, writer, None)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = scalars(report)
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (7, value), name
    (event,) = events.Tensors("mhc/composite")
    composite_ = tensor_util.make_ndarray(event.tensor_proto)
    assert composite_ == pytest.approx(torch.tensor(report.composite).numpy())


def test_off_means_no_hook_on_any_step(monkeypatch):
    tensorboard, wandb, seen, _ = run_steps(monkeypatch, MHCConfig(), 3)
    assert seen == [False] * 3 and not tensorboard.scalars and not wandb.logged


@pytest.mark.parametrize("alarm", ["warn", "stop"])
def test_alarm_warns_once_and_stops_where_asked(monkeypatch, caplog, alarm):
    mhc = MHCConfig(log_interval=1, alarm=alarm, alarm_logit=1e-3)
    with caplog.at_level("WARNING"):
        *_, results = run_steps(monkeypatch, mhc, 2)
    warnings = [r.getMessage() for r in caplog.records if "mHC alarm at step" in r.getMessage()]
    assert len(warnings) == 1
    assert "mHC alarm at step 1: logit_" in warnings[0] and "of layer_001_" in warnings[0]
    should_exit, exit_code = results[0][3:5]
    assert (should_exit, exit_code) == ((True, 1) if alarm == "stop" else (False, 0))
    assert len(results[0]) == 8


def test_nowhere_to_write_is_refused():
    import argparse

    silent = argparse.Namespace(tensorboard_dir=None, wandb_project="")
    with pytest.raises(ValueError, match="--mhc-log-interval 5 has nowhere to write: add --tensorboard-dir"):
        check_writers(silent, MHCConfig(log_interval=5))
    check_writers(silent, MHCConfig())
    check_writers(silent, MHCConfig(log_interval=5, alarm="warn"))
    check_writers(argparse.Namespace(tensorboard_dir="t"), MHCConfig(log_interval=5))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(log_interval=-1), "--mhc-log-interval=-1"),
        (dict(log_tokens=0), "--mhc-log-tokens=0"),
        (dict(alarm="warn"), "add --mhc-log-interval"),
        (dict(alarm="shout"), "--mhc-alarm='shout' is unknown: choose one of off, warn, stop"),
        (dict(alarm_gain=1.0), "--mhc-alarm-gain=1.0"),
        (dict(alarm_gain=math.nan), "--mhc-alarm-gain=nan"),
        (dict(alarm_logit=0.0), "--mhc-alarm-logit=0.0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MHCConfig(**options)


def test_diagnostics_are_no_part_of_a_checkpoints_arithmetic():
    assert MHCConfig(log_interval=7, log_tokens=3, alarm="stop").arithmetic() == MHCConfig().arithmetic()


def test_a_report_is_saved_as_json(tmp_path):
    report = fake_report()
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == dataclasses.asdict(report)


def test_sublayers_are_named_by_megatrons_layer_numbers():
    assert [sublayer_name(i) for i in (0, 1, 5)] == ["layer_001_attention", "layer_001_mlp", "layer_003_mlp"]
