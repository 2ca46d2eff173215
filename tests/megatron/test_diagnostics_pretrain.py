"""Diagnostics in Megatron's own pretrain(), on gloo processes, and from a checkpoint."""

import argparse
import json
import math
import subprocess
import sys

import pretrain_runs
import pytest
import torch
from gpt import batch, build, forward_backward
from pretrain_runs import ARGUMENTS, MHC, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from megatron_mhc import MHCConfig, hooks
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.diagnostics.sampler import connections
from megatron_mhc.hooks.train_step import sample_steps
from megatron_mhc.testing.ranks import RankError

LOGGED = ["--mhc-log-interval", "2", "--mhc-log-tokens", "16", "--train-iters", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def run(module: list[str], arguments: list[str], processes: int = 2) -> tuple[int, str]:
    """Exit status and output of a module with the arguments of `pretrain_runs` and these."""
    return pretrain_runs.run([*module, *ARGUMENTS, *MHC, *arguments], processes)


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps on two stages of two virtual stages, sampled at the second and fourth, with an alarm."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = [*LOGGED, *PP2, "--num-layers-per-virtual-pipeline-stage", "1"]
    arguments += ["--mhc-alarm", "warn", "--mhc-alarm-logit", "0.01", "--save", str(folder / "checkpoint")]
    arguments += ["--tensorboard-dir", str(folder / "tensorboard")]
    status, output = run(["megatron_mhc.pretrain_gpt"], arguments)
    assert status == 0, output[-3000:]
    return folder, output


def test_training_writes_every_sublayer_into_megatrons_tensorboard(trained):
    folder, output = trained
    log = events(folder / "tensorboard")
    tags = [tag for tag in log.Tags()["scalars"] if tag.startswith("mhc/")]
    per_layer = [tag for tag in tags if tag.startswith("mhc/composite_gain_forward/")]
    assert sorted(per_layer) == [
        f"mhc/composite_gain_forward/layer_{layer:03d}_{part}"
        for layer in range(1, 5)
        for part in ("attention", "mlp")
    ]
    for tag in tags:
        assert [event.step for event in log.Scalars(tag)] == [2, 4], tag
        assert all(math.isfinite(event.value) for event in log.Scalars(tag)), tag
    for layer in range(1, 5):  # H_res of rows that sum to 1, so does their product
        for part in ("attention", "mlp"):
            event = log.Scalars(f"mhc/composite_gain_forward/layer_{layer:03d}_{part}")[-1]
            assert event.value == pytest.approx(1, abs=1e-5)
    for name in ("h_res", "composite"):
        (_, last) = log.Tensors(f"mhc/{name}")
        matrices = tensor_util.make_ndarray(last.tensor_proto)
        assert matrices.shape == (8, 4, 4)
        assert abs(matrices.sum(axis=2) - 1).max() < 1e-5
    # Megatron's own scalars are there as before, at every step.
    assert [event.step for event in log.Scalars("lm loss")] == [1, 2, 3, 4]
    assert output.count("mHC alarm at step") == 1 and "mHC alarm at step 2: logit_" in output


def test_alarm_stops_all_ranks(tmp_path):
    arguments = [*LOGGED, *PP2, "--mhc-alarm", "stop", "--mhc-alarm-logit", "0.01"]
    status, output = run(["megatron_mhc.pretrain_gpt"], arguments)
    assert status != 0
    assert "mHC alarm at step 2: logit_" in output and "stopping without saving" in output
    assert "iteration        1/       4" in output and "iteration        3/       4" not in output


def test_a_checkpoint_measures_the_same_in_every_layout(trained, tmp_path):
    folder, _ = trained

    def measure(processes: int) -> dict:
        path = tmp_path / f"{processes}.json"
        arguments = [*(PP2 if processes == 2 else []), "--load", str(folder / "checkpoint")]
        status, output = run(["megatron_mhc.diagnostics.measure", str(path)], arguments, processes)
        assert status == 0, output[-3000:]
        return json.loads(path.read_text())

    one, two = measure(1), measure(2)
    assert one["statistics"].keys() == two["statistics"].keys()
    for name, values in one["statistics"].items():
        assert values == pytest.approx(two["statistics"][name], rel=1e-4, abs=1e-5), name
    assert len(one["h_res"]) == 8
    assert one["statistics"]["alpha_res"] != [0.5] * 8  # trained, not initial


def training_step_with(mhc):
    """Whether Megatron's own train_step is there once a model is built, and how many of its modules are
    hooked; on a rank of its own, which ends with it."""
    from megatron.training import global_vars, training

    original = training.train_step
    global_vars.set_args(argparse.Namespace())
    model = build(mhc)
    found = connections(model)
    assert len(found) == 4
    hooked = [m for c in found for m in c.modules() if m._forward_hooks or m._forward_pre_hooks]
    own = training.train_step is original
    hooks.revert_all()
    assert training.train_step is original
    return own, len(hooked)


def test_off_leaves_megatrons_training_step_and_the_model_alone(run_ranks):
    assert run_ranks(1, training_step_with, MHCConfig()) == [(True, 0)]
    assert run_ranks(1, training_step_with, MHCConfig(log_interval=5)) == [(False, 0)]


def build_in_a_loop_of_ones_own():
    with pytest.raises(ValueError) as error:
        build(MHCConfig(log_interval=2, alarm="stop"))
    model = build(MHCConfig())
    with Sampler(model, model.config) as sampler, torch.no_grad():
        model(*batch(0)[0])
    return str(error.value), sampler.report().statistics["gain_forward"]


def test_an_interval_in_a_loop_of_ones_own_is_refused_and_the_sampler_offered(run_ranks):
    said, gains = run_ranks(1, build_in_a_loop_of_ones_own)[0]
    assert said.startswith("log_interval=2 samples steps of megatron.training's own loop")
    assert "with megatron_mhc.diagnostics.Sampler(model, config) as sampler" in said
    assert gains == pytest.approx([1.0] * 4, abs=0.01)


def reports():
    return hooks.register().report(), hooks.register(training=True).report()


def test_report_lists_the_training_hook_only_where_it_is_registered(run_ranks):
    without, with_ = run_ranks(1, reports)[0]
    assert "train_step" not in without and "megatron.training.training:train_step" in with_


def build_on_a_foreign_step():
    from megatron.training import global_vars, training

    global_vars.set_args(argparse.Namespace())
    training.train_step = lambda *args: None
    build(MHCConfig(log_interval=1))


def test_a_foreign_training_step_is_refused(run_ranks):
    with pytest.raises(RankError, match="ValueError: megatron.training.training:train_step was replaced by"):
        run_ranks(1, build_on_a_foreign_step)


def plain_step():
    def train_step(*args, iteration=None, **groups):
        return len(args), iteration, groups

    model = build()
    arguments = ("forward", "data", [model], "optimizer", "scheduler", model.config, "schedule")
    return sample_steps(train_step)(*arguments, iteration=0, p2p=1)


def test_a_plain_model_is_trained_as_it_is(run_ranks):
    assert run_ranks(1, plain_step) == [(7, 0, {"p2p": 1})]


def gradients_with_and_without():
    mhc = MHCConfig(init="uniform", init_gating_factor=0.5)
    plain = forward_backward(build(mhc))
    model = build(mhc)
    with Sampler(model, model.config) as sampler:
        sampled = forward_backward(model)
    assert len(sampler.samples) == 4
    return plain, sampled


def test_gradients_do_not_change_while_sampled(run_ranks):
    (loss, gradients), (sampled_loss, sampled) = run_ranks(1, gradients_with_and_without)[0]
    assert loss == sampled_loss
    assert all(gradients[name].equal(sampled[name]) for name in gradients)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stability_example_runs_resumes_and_draws(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "stability" / "run.py"), "--cpu", "--jobs", "2"]
    command += "--layers 2 --hidden 32 --heads 2 --sequence 32 --batch 2 --steps 8 --warmup 2".split()
    command += ["--log-interval", "4", "--seeds", "1,2", "--out", str(tmp_path)]

    def call(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=900)

    done = call()
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"gains.png", "heatmaps.png", "curves.png", "loss_gap.png", "summary.json"} <= figures
    rows = json.loads((tmp_path / "figures" / "summary.json").read_text())
    assert [(row["model"], row["seeds"]) for row in rows] == [("plain", 2), ("HC", 2), ("mHC", 2)]
    assert rows[2]["peak_composite_gain_forward"] == pytest.approx(1, abs=1e-4)
    logs = {path: path.stat().st_mtime for path in tmp_path.glob("*/log.txt")}
    assert len(logs) == 6
    assert call().returncode == 0  # finished runs are not repeated
    assert logs == {path: path.stat().st_mtime for path in tmp_path.glob("*/log.txt")}
    other = call("--layers", "3")
    assert other.returncode != 0 and "holds runs with --layers 2, not 3" in other.stderr
