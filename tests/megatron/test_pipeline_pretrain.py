"""The overlapping schedule under Megatron's own pretrain(): training, evaluation, checkpoints, resume."""

import pytest
import torch
from pretrain_runs import MHC, STEPS, launch, tensors

PIPELINE = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
SPLIT = [*MHC, *PIPELINE, "--mhc-pipeline-schedule", "interleaved", "--mhc-pp-boundary", "split"]
SPLIT += ["--mhc-recompute-layer-num", "auto"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Ten steps under the split boundary, saved after five and after ten."""
    folder = tmp_path_factory.mktemp("split")
    values, output = launch(folder, *SPLIT, "--save", str(folder / "checkpoint"))
    return folder / "checkpoint", values, output


def test_training_under_the_split_boundary(unbroken):
    _, values, output = unbroken
    assert len(values) == STEPS
    assert values[-1] < values[0] - 0.2
    assert "validation loss at iteration 10 on validation set" in output


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(
        tmp_path,
        *SPLIT,
        "--load",
        str(checkpoint),
        "--ckpt-step",
        "5",
        "--save",
        str(tmp_path / "checkpoint"),
    )
    assert resumed == values[5:]
    expected, got = tensors(checkpoint / "iter_0000010"), tensors(tmp_path / "checkpoint" / "iter_0000010")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_auto_says_what_it_takes_and_trains(unbroken, tmp_path):
    """The model is built, and Megatron's training loop asks for a schedule, after the choice."""
    _, values, _ = unbroken
    flags = [*MHC, *PIPELINE, "--mhc-pipeline-schedule", "auto", "--logging-level", "20"]
    chosen, output = launch(tmp_path, *flags)
    said = [line for line in output.splitlines() if "mHC pipeline schedule: " in line]
    assert len(said) == 1 and "by --mhc-pipeline-schedule auto: simulated steps in ms: megatron" in said[0]
    torch.testing.assert_close(torch.tensor(chosen), torch.tensor(values), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_checkpoint_of_one_schedule_resumes_under_the_other(unbroken, tmp_path):
    """--mhc-pipeline-schedule is no part of a checkpoint's arithmetic; fp32 losses agree to 1e-5."""
    checkpoint, values, _ = unbroken
    stock, _ = launch(tmp_path, *MHC, *PIPELINE, "--load", str(checkpoint), "--ckpt-step", "5")
    torch.testing.assert_close(torch.tensor(stock), torch.tensor(values[5:]), rtol=1e-5, atol=0)
