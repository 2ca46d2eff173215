"""--overlap-moe-expert-parallel-comm under Megatron's own pretrain(): training, evaluation, resume."""

import pytest
from pretrain_runs import MHC, STEPS, launch

EXPERTS = [*MHC, "--bf16", "--num-experts", "4", "--expert-model-parallel-size", "2", "--moe-layer-freq"]
EXPERTS += ["[0,1,1,1]", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"]
EXPERTS += ["--moe-shared-expert-intermediate-size", "32", "--moe-token-dispatcher-type", "alltoall"]
EXPERTS += ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-moe-expert-parallel-comm", "--mhc-recompute-layer-num", "3"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Ten steps, saved after five."""
    folder = tmp_path_factory.mktemp("overlap")
    values, output = launch(folder, *EXPERTS, *OVERLAP, "--save", str(folder / "checkpoint"))
    return folder / "checkpoint", values, output


def test_training_gives_the_losses_that_it_gives_without_the_flag(unbroken, tmp_path):
    _, values, output = unbroken
    assert len(values) == STEPS
    assert values[-1] < values[0] - 0.2
    assert "validation loss at iteration 10 on validation set" in output
    apart, _ = launch(tmp_path, *EXPERTS)
    assert values == apart


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(tmp_path, *EXPERTS, *OVERLAP, "--load", str(checkpoint), "--ckpt-step", "5")
    assert resumed == values[5:]
