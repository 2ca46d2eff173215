"""Megatron's own pretrain() with the gated residual of Qwen4-Exp, on gloo processes."""

from pretrain_runs import launch

GATED = "--mhc-preset qwen4_exp --mhc-gated-rank 8 --pipeline-model-parallel-size 2 --bf16".split()
GATED += (
    "--train-iters 6 --save-interval 3 --lr-decay-iters 10 --mhc-log-interval 2 --logging-level 20".split()
)


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path):
    values, output = launch(tmp_path / "whole", *GATED, "--save", str(tmp_path / "checkpoint"))
    assert values[-1] < values[0]
    assert "preset=qwen4_exp" in output and "operations: reference" in output
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "3"]
    resumed, _ = launch(tmp_path / "resumed", *GATED, *load)
    assert resumed == values[3:]
