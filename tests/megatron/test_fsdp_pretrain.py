"""Pretraining under Megatron-FSDP and FSDP2 on two processes: what is taken from their checkpoints."""

import pytest
from pretrain_runs import MHC, attempt, launch

pytest.importorskip("einops", reason="Megatron-FSDP makes its meshes by it")
MEGATRON = "--bf16 --use-megatron-fsdp --ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion".split()
SHARDED = [*MEGATRON, "--data-parallel-sharding-strategy", "optim_grads_params"]
FSDP2 = "--bf16 --use-torch-fsdp2 --ckpt-format torch_dist".split()
PARTLY = "--no-strict-fsdp-dtensor-load"  # else Megatron names the first key that is not there
HEAD = ["--mhc-contract", "learned_head"]


def save(folder, *arguments):
    """Train with checkpoints after steps 5 and 10, of which the first is the one to load; the losses."""
    losses, _ = launch(folder / "unbroken", *arguments, "--save", str(folder / "saved"))
    (folder / "saved" / "latest_checkpointed_iteration.txt").write_text("5")
    return losses


@pytest.mark.parametrize(
    "strategy",
    [
        "optim_grads_params",
        pytest.param("optim_grads", marks=pytest.mark.slow),
        pytest.param("optim", marks=pytest.mark.slow),
    ],
)
def test_megatron_fsdp_resumes_bit_for_bit(tmp_path, strategy):
    arguments = [*MEGATRON, "--data-parallel-sharding-strategy", strategy, *MHC, *HEAD]
    unbroken = save(tmp_path, *arguments)
    resumed, _ = launch(tmp_path / "resumed", *arguments, "--load", str(tmp_path / "saved"))
    assert resumed == unbroken[5:]


def test_fsdp2_goes_on_from_its_checkpoint(tmp_path):
    unbroken = save(tmp_path, *FSDP2, *MHC, *HEAD)
    resumed, _ = launch(tmp_path / "resumed", *FSDP2, *MHC, *HEAD, "--load", str(tmp_path / "saved"))
    # In stock too, Adam then counts its steps from 0, and the next losses are others.
    assert resumed[0] == unbroken[5]


def test_a_plain_checkpoint_of_megatron_fsdp_is_refused_by_mhc(tmp_path):
    save(tmp_path, *SHARDED, "--no-mhc")
    code, output = attempt(tmp_path / "mhc", *SHARDED, "--load", str(tmp_path / "saved"), PARTLY)
    assert code and "the checkpoint is a plain model's" in output


def test_an_mhc_checkpoint_of_megatron_fsdp_is_refused_by_others(tmp_path):
    save(tmp_path, *SHARDED, *MHC, *HEAD)
    load = ["--load", str(tmp_path / "saved")]
    code, output = attempt(tmp_path / "plain", *SHARDED, "--no-mhc", *load, PARTLY)
    assert code and "is an mHC model's" in output
    # A strict load drops what has no place.
    code, output = attempt(tmp_path / "sum", *SHARDED, *MHC, *load)
    assert code and "head.alpha is in the checkpoint, and not in this model: pass the --mhc-*" in output
    code, output = attempt(tmp_path / "preset", *SHARDED, *MHC, *HEAD, "--mhc-preset", "deepseek_v4", *load)
    assert code and "the checkpoint was trained with --mhc-preset paper" in output
