"""Pretraining runs on two gloo processes, and what they leave: losses and checkpoints."""

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

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


def launch(folder: Path, *arguments: str, by_torchrun: bool = False) -> tuple[list[float], str]:
    """Run pretraining on two processes; returns the training losses and all that it printed."""
    code, output = attempt(folder, *arguments, by_torchrun=by_torchrun)
    assert code == 0, "\n".join(output.splitlines()[-40:])
    return losses(folder / "tensorboard"), output


def attempt(folder: Path, *arguments: str, by_torchrun: bool = False) -> tuple[int, str]:
    """Run pretraining on two processes; returns the exit status and all that it printed."""
    module = ["megatron_mhc.pretrain_gpt", *ARGUMENTS, "--tensorboard-dir", str(folder / "tensorboard")]
    return (torchrun if by_torchrun else run)([*module, *arguments], 2)


def run(module: list[str], processes: int) -> tuple[int, str]:
    """What `torchrun` does, in a tenth of its time: the processes are forked from one that has Megatron."""
    server = _server()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        asked = dict(module=module, processes=processes, output=output.name, seconds=200)
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, "pretrain_server.py ended; what it said stands above"
        return int(status), output.read()


@functools.cache
def _server() -> subprocess.Popen:
    """Ends with this process, at the end of what it reads."""
    command = [sys.executable, str(Path(__file__).with_name("pretrain_server.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def torchrun(module: list[str], processes: int) -> tuple[int, str]:
    """Exit status and output of a module on CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "megatron_mhc.testing.cpu", "-m", *module]
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
