"""The quickstart's two models and the Megatron arguments that train them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
    --position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 64
    --no-create-attention-mask-in-dataloader
"""
OPTIMIZER = """
    --lr-decay-style cosine --min-lr 1e-4 --lr-warmup-iters 10
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
"""
# Without TransformerEngine and apex: plain torch in place of their fused CUDA kernels.
NO_FUSION = """
    --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion
"""
CPU = "--distributed-backend gloo --transformer-impl local"
CPU_SIZE = """
    --num-layers 8 --hidden-size 128 --num-attention-heads 4 --init-method-std 0.06
    --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 4 --lr 3e-3
"""
GPU_SIZE = """
    --num-layers 12 --hidden-size 512 --num-attention-heads 8 --init-method-std 0.03
    --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 16 --global-batch-size 32 --lr 1e-3
"""


@dataclass(frozen=True)
class Machine:
    """What to train on: one GPU, or `processes` CPU processes as pipeline stages."""

    gpu: bool
    processes: int

    @classmethod
    def find(cls, cpu: bool) -> Machine:
        """The GPU where one is (and `cpu` does not forbid it), else two CPU processes."""
        import torch

        gpu = not cpu and torch.cuda.is_available()
        return cls(gpu=gpu, processes=1 if gpu else 2)

    def __str__(self) -> str:
        if not self.gpu:
            return f"{self.processes} CPU processes (pipeline parallel {self.processes}, gloo, fp32)"
        import torch

        layers = "TransformerEngine" if transformer_engine() else "Megatron's local"
        return f"one {torch.cuda.get_device_name()} (bf16, {layers} layers)"

    def launch(self, module: list[str], processes: int | None = None) -> list[str]:
        """The torchrun command that runs `module` (a script, or -m and a module's name)."""
        processes = processes or self.processes
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(processes)]
        # On a CPU, Megatron runs inside the package's gloo runner.
        return torchrun + ([] if self.gpu else ["-m", "megatron_mhc.testing.cpu"]) + module

    def arguments(self) -> list[str]:
        """Megatron's arguments for the model's size and what this machine can run."""
        text = MODEL + OPTIMIZER + (GPU_SIZE if self.gpu else CPU_SIZE)
        if not self.gpu:
            text += CPU + NO_FUSION + "--num-workers 0"
        elif transformer_engine():
            # The fused accumulation of weight gradients in the output layer needs apex.
            text += "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
        else:
            text += "--bf16 --transformer-impl local" + NO_FUSION
        return shlex.split(text)


def transformer_engine() -> bool:
    """Whether TransformerEngine can be imported, which a broken installation cannot."""
    if find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:
        return False
    return True


def data_arguments(prefix: Path) -> list[str]:
    """Megatron's arguments for the text at `prefix`: 95 % to train on and 5 % for validation."""
    return [
        "--data-path",
        str(prefix),
        "--data-cache-path",
        str(prefix.parent / "cache"),
        "--split",
        "95,5,0",
    ]
