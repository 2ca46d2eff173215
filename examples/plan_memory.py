"""Plan the memory of a recipe on every pipeline rank, without a GPU and without its weights.

    DATA=mock DRY_RUN=1 bash examples/train.sh 27b mhc > recipe.txt
    python examples/plan_memory.py recipe.txt --world-size 128

Parameters are counted on the model itself, built on torch's meta device. GiB by their rules:

    weights      2 bytes of bf16; mappings 4 bytes of fp32
    gradients    4 bytes, fp32
    optimizer    12 bytes of bf16 weights, 8 of fp32, divided over data-parallel ranks
    activations  of decoder layers at their peak, by `python -m megatron_mhc.recompute`
    loss         logits in bf16 and fp32 and their gradient: 8 bytes each

Not counted: norms inside MLA (below 0.01 % of the weights), imbalance of experts, and what kernels, NCCL
and the allocator need beside them (several GiB).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from megatron_mhc import command_line
from megatron_mhc.recompute import estimate
from megatron_mhc.schedule.stages import layers_of_rank

GIB = 2**30
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Flags that a single rank refuses, and how many words each is.
_PARALLEL = {
    "--sequence-parallel": 1,
    "--moe-grouped-gemm": 1,
    "--num-virtual-stages-per-pipeline-rank": 2,
    "--num-layers-per-virtual-pipeline-stage": 2,
    "--pipeline-model-parallel-layout": 2,
    "--decoder-first-pipeline-num-layers": 2,
    "--decoder-last-pipeline-num-layers": 2,
    "--account-for-embedding-in-pipeline-split": 1,
    "--account-for-loss-in-pipeline-split": 1,
}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; keys are 0-based layers, "first" (embedding) and "last" (norm and output)."""

    bf16: Counter[int | str]
    fp32: Counter[int | str]
    experts: Counter[int | str]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(part.total() for part in (self.bf16, self.fp32, self.experts))

    @property
    def mappings(self) -> int:
        """Those of mHC, which a plain model has not."""
        return self.fp32.total()

    def active(self, topk: int, experts: int) -> float:
        """Those that one token meets; of the embedding it looks up one row, which is not counted."""
        return self.total - self.bf16["first"] - self.experts.total() * (1 - topk / experts)


@dataclass(frozen=True)
class RankPlan:
    """Bytes on one pipeline rank."""

    layers: list[int]
    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All that is counted."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def single(words: list[str]) -> list[str]:
    """A recipe's arguments for one rank and for Megatron's local modules, which a CPU can build."""
    words = list(words)
    for flag, count in _PARALLEL.items():
        while flag in words:
            at = words.index(flag)
            del words[at : at + count]
    if "--q-lora-rank" not in words and "--multi-latent-attention" in words:
        words.remove("--qk-layernorm")  # Megatron's local spec refuses it without a compressed query
    for dimension in ("tensor", "pipeline", "expert"):
        words += [f"--{dimension}-model-parallel-size", "1"]
    words += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
    return [*words, "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]


def count(words: list[str]) -> tuple[Parameters, Any]:
    """Count the parameters of a recipe's model, and return Megatron's arguments too."""
    args, config, mhc = command_line.parse(single(words), 1)
    config.perform_initialization = False
    with one_process(), on_meta():
        model = build(args, config, None if args.no_mhc else mhc)
    found = Parameters(Counter(), Counter(), Counter())
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        where: int | str = "first" if name.startswith("embedding.") else "last"
        where = int(match.group(1)) if match else where
        if not mhc.is_gated and ("hyper_connection" in name or ".head." in name):
            found.fp32[where] += parameter.numel()
        else:
            (found.experts if ".experts." in name else found.bf16)[where] += parameter.numel()
    return found, args


def build(args: Any, config: Any, mhc: Any) -> torch.nn.Module:
    """The model of Megatron's arguments, plain where `mhc` is None."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import default_layer_spec

    from megatron_mhc.specs import wrap_block_spec

    args.padded_vocab_size = vocabulary(args)
    model = gpt_config_from_args(args, config=config)
    spec: Any = default_layer_spec(model, None)
    if mhc is not None:
        mhc = dataclasses.replace(mhc, log_interval=0, alarm="off")  # no training loop is set up
        spec = wrap_block_spec(spec, mhc, config)
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def vocabulary(args: Any) -> int:
    """Tokens, padded as Megatron pads them; of mock data, whose tokenizer adds an end token."""
    if args.vocab_size is None:
        raise ValueError("--vocab-size: plan with DATA=mock, a tokenizer's size is not known here")
    step = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-(args.vocab_size + 1) // step) * step


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups of one rank, for as long as they are needed; existing ones are used."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mhc.testing import cpu

    cpu.patch_megatron()
    cpu.use_local_modules()
    mine = not torch.distributed.is_initialized()
    if mine:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        if mine:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@contextmanager
def on_meta() -> Iterator[None]:
    """Let Megatron's parameters, which it puts on the current GPU, have shapes and no storage."""
    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current


def plan(words: list[str], world: int | None) -> list[RankPlan]:
    """Plan every pipeline rank of a recipe on `world` ranks."""
    parameters, args = count(words)
    args, config, mhc = command_line.parse(words, world)
    replicas = args.data_parallel_size * args.context_parallel_size
    expert_replicas = replicas * args.tensor_model_parallel_size / args.expert_model_parallel_size
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    tp, last = args.tensor_model_parallel_size, config.pipeline_model_parallel_size - 1
    logits = tokens * vocabulary(args) / tp
    out = []
    found = estimate.ranks(config, mhc, args.seq_length, args.micro_batch_size, micro_batches)
    for number, rank in enumerate(found):
        ends = [*["first"] * (number == 0), *["last"] * (number == last)]
        keys = [*chain(*layers_of_rank(config, number)), *ends]
        dense = sum(parameters.bf16[key] for key in keys) / tp
        mappings = sum(parameters.fp32[key] for key in keys)
        experts = sum(parameters.experts[key] for key in keys) / args.expert_model_parallel_size
        if args.no_mhc:
            activations = rank.vanilla
        elif mhc.recompute_layer_num == "off":
            activations = rank.mhc()
        else:
            activations = rank.with_blocks(mhc.recompute_layer_num)
        out.append(
            RankPlan(
                layers=rank.layers,
                weights=2 * (dense + experts) + 4 * mappings,
                gradients=4 * (dense + experts + mappings),
                optimizer=(12 * dense + 8 * mappings) / replicas + 12 * experts / expert_replicas,
                activations=activations,
                loss=8 * logits if number == last else 0,
            )
        )
    return out


def main() -> None:
    """Print the plan of a recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", type=command_line.recipe, help="file with the command that DRY_RUN=1 prints"
    )
    parser.add_argument("--world-size", type=int, help="ranks; default: torchrun's")
    given = parser.parse_args()
    command = command_line.take_apart(given.recipe)
    ranks = plan(command.arguments, given.world_size or command.world)
    names = ("weights", "gradients", "optimizer", "activations", "loss", "total")
    print("GiB".ljust(14) + "".join(f"rank {i}".rjust(10) for i in range(len(ranks))))
    for name in names:
        print(name.ljust(14) + "".join(f"{getattr(rank, name) / GIB:.2f}".rjust(10) for rank in ranks))


if __name__ == "__main__":
    main()
