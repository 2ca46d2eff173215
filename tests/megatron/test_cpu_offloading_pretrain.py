"""--cpu-offloading-num-layers under Megatron's own pretrain(), by a stand-in of TE's context."""

import pytest
from pretrain_runs import MHC, STEPS, launch

OFFLOADED = ["--cpu-offloading-num-layers", "2"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The losses of ten steps without."""
    return launch(tmp_path_factory.mktemp("stored"), *MHC, "--bf16")[0]


def test_training_gives_the_losses_that_it_gives_without_the_flag(stored, tmp_path):
    folder = tmp_path / "checkpoint"
    values, output = launch(tmp_path, *MHC, "--bf16", *OFFLOADED, "--save", str(folder))
    assert len(values) == STEPS and values == stored
    assert "validation loss at iteration 10 on validation set" in output
    again = tmp_path / "resumed"
    resumed, _ = launch(again, *MHC, "--bf16", *OFFLOADED, "--load", str(folder), "--ckpt-step", "5")
    assert resumed == values[5:]
