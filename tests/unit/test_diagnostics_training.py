"""Writers, the alarm and the options, in Megatron's training loop."""

import dataclasses
import json
import math
import re

import pytest
import torch
from diagnostics_cases import C, N, T, config_of, connections, random_samples

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics.report import Report, reduce_samples, sublayer_names
from megatron_mhc.diagnostics.training import check_writers, out_of_range, scalars, write
from megatron_mhc.hooks.train_step import sample_steps


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
        (dict(alarm="shout"), "--mhc-alarm='shout': give one of off, warn, stop"),
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
    names = sublayer_names(config_of(MHCConfig(), layers=3), MHCConfig())
    assert [names[i] for i in (0, 1, 5)] == ["layer_001_attention", "layer_001_mlp", "layer_003_mlp"]
