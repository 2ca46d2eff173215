"""Megatron's own pretrain() through megatron_mhc.pretrain_gpt, on gloo processes that torchrun starts.

Losses come from TensorBoard, which keeps all of their 32 bits; the oracle of a resumed run is the run
that was never interrupted.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
ARGUMENTS = shlex.split("""
    --distributed-backend gloo --transformer-impl local --no-create-attention-mask-in-dataloader
    --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --num-workers 0
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 64
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-decay-style cosine --weight-decay 0.1
    --split 90,10,0 --log-interval 1 --eval-iters 1 --eval-interval 1000 --save-interval 5
""")
ARGUMENTS += ["--train-iters", str(STEPS)]
# Not the default initialisation: its mappings hardly depend on their input in the first steps.
MHC = shlex.split("--mhc-num-residual-streams 4 --mhc-init uniform --mhc-init-gating-factor 0.5")


def launch(folder: Path, *arguments: str) -> tuple[list[float], str]:
    """Run pretraining on two processes; returns the training losses and all that it printed."""
    code, output = attempt(folder, *arguments)
    assert code == 0, "\n".join(output.splitlines()[-40:])
    return losses(folder / "tensorboard"), output


def attempt(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run pretraining on two processes; returns the exit status and all that it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_mhc.testing.cpu", "-m", "megatron_mhc.pretrain_gpt", *ARGUMENTS]
    command += ["--tensorboard-dir", str(folder / "tensorboard"), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.terminate()  # torchrun then ends its ranks
        process.wait(timeout=30)
    return process.returncode, output


def losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("lm loss")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a torch_dist checkpoint, weights and optimizer state, put together from its shards."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Ten steps with mHC on two pipeline stages, saved after five and after ten."""
    folder = tmp_path_factory.mktemp("unbroken")
    values, output = launch(
        folder, *MHC, "--pipeline-model-parallel-size", "2", "--save", str(folder / "checkpoint")
    )
    return folder / "checkpoint", values, output


def test_training_with_mhc_lowers_the_loss(unbroken):
    checkpoint, values, output = unbroken
    assert len(values) == STEPS
    assert values[-1] < values[0] - 0.2
    assert "validation loss at iteration 10 on validation set" in output
    assert any("hyper_connection.mapping_proj.weight" in key for key in tensors(checkpoint / "iter_0000010"))


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(
        tmp_path,
        *MHC,
        *("--pipeline-model-parallel-size", "2", "--load", str(checkpoint), "--ckpt-step", "5"),
        *("--save", str(tmp_path / "checkpoint")),
    )
    assert resumed == values[5:]
    expected, got = tensors(checkpoint / "iter_0000010"), tensors(tmp_path / "checkpoint" / "iter_0000010")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_a_run_saved_on_two_stages_resumes_on_two_tensor_parallel_ranks(unbroken, tmp_path):
    checkpoint, values, _ = unbroken
    resumed, _ = launch(
        tmp_path,
        *MHC,
        *("--tensor-model-parallel-size", "2", "--load", str(checkpoint), "--ckpt-step", "5"),
    )
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(values[5:]), rtol=1e-5, atol=0)


TORCH = "--pipeline-model-parallel-size 2 --ckpt-format torch --train-iters 1 --eval-iters 0".split()


@pytest.mark.parametrize(
    "saved, loaded, words",
    [
        (MHC, ["--no-mhc"], "drop --no-mhc"),
        pytest.param(["--no-mhc"], MHC, "--mhc-load-dense together with", marks=pytest.mark.slow),
    ],
    ids=["plain", "mhc"],
)
def test_checkpoints_of_the_other_kind_are_refused_in_the_torch_format(tmp_path, saved, loaded, words):
    """megatron.training's second attempt, which is not strict, would train on without the streams."""
    folder = str(tmp_path / "checkpoint")
    launch(tmp_path / "saved", *saved, *TORCH, "--save", folder)
    code, output = attempt(tmp_path / "loaded", *loaded, *TORCH, "--load", folder, "--finetune")
    assert code != 0 and words in output, output[-3000:]
    assert "lm loss:" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [[], ["--use-distributed-optimizer"]], ids=["replicated", "distributed"]
)
def test_fully_parallel_save_and_load_resume_bit_for_bit(tmp_path, optimizer):
    """Two data-parallel ranks share the writing (Megatron's default) and the reading of a checkpoint."""
    arguments = [*MHC, *optimizer, "--ckpt-fully-parallel-load"]
    values, output = launch(tmp_path / "whole", *arguments, "--save", str(tmp_path / "checkpoint"))
    assert re.search(r"ckpt_fully_parallel_save \.+ True", output)
    load = ["--load", str(tmp_path / "checkpoint"), "--ckpt-step", "5"]
    resumed, _ = launch(tmp_path / "resumed", *arguments, *load)
    assert resumed == values[5:]


def test_mhc_options_contradict_no_mhc():
    from argparse import ArgumentParser

    from megatron_mhc.pretrain_gpt import add_args, check_args

    parser = ArgumentParser()
    parser.add_argument("--spec", nargs="*", default=None)
    args = add_args(parser).parse_args(["--no-mhc", "--mhc-num-residual-streams", "2"])
    with pytest.raises(ValueError, match="--no-mhc"):
        check_args(args)
    args = parser.parse_args(["--spec", "a", "b"])
    with pytest.raises(ValueError, match="--spec a b: drop it"):
        check_args(args)
