"""Pretrain a GPT or a HybridModel with mHC through Megatron's own `pretrain()`, from the wheel alone.

    torchrun --nproc-per-node 8 -m megatron_mhc.pretrain_gpt <Megatron arguments> [--mhc-...]

Any parallel layout of Megatron-Core; data from --data-path or --mock-data. --hybrid-layer-pattern makes it a
HybridModel, as everywhere in Megatron. `--no-mhc` trains the same model without mHC. What Megatron-LM's
scripts have beyond that (SFT, fill-in-the-middle, packed sequences, ModelOpt) runs with mHC through
`megatron_mhc.launch`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_mhc.version import check_version

check_version()  # another Megatron may lack what is imported below

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_tokenizer, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_mhc import hooks, training_doors
from megatron_mhc.arguments import add_mhc_args
from megatron_mhc.config import MHCConfig
from megatron_mhc.door_refusals import ENTRY_POINT
from megatron_mhc.graphs import release
from megatron_mhc.hooks.uses import PRETRAIN_USES, SPEC_USES
from megatron_mhc.refusals import refuse
from megatron_mhc.training_doors import BATCH_KEYS


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc-* flags and --no-mhc; --help then works, which Megatron's own texts break."""
    add_mhc_args(parser)
    parser.add_argument("--no-mhc", action="store_true", help="train the plain model, as a baseline")
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):  # a bare % where argparse reads a format
            action.help = re.sub(r"%%|%(?!\(\w+\))", "%%", str(action.help))
    return parser


def check_args(args: Any) -> None:
    """Refuse what this entry point does not do.

    Raises:
        ValueError: naming the flag and the door to use instead.
    """
    if args.spec is not None:
        raise ValueError(f"--spec {' '.join(args.spec)}: drop it; mHC wraps the layers that Megatron chooses")
    refuse(ENTRY_POINT, args)
    if args.no_mhc and MHCConfig.from_args(args) != MHCConfig():
        raise ValueError("--no-mhc together with --mhc-* options: drop one of them")


def needs_batch(config: Any, vp_stage: int | None) -> bool:
    """Whether this model chunk reads tokens or labels: the first and last stage, and those with MTP."""
    return is_first_or_last_pipeline_stage(vp_stage) or training_doors.predicts(config, vp_stage)


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, model: Any) -> dict[str, Tensor | None]:
    """Read one micro-batch on TP rank 0, broadcast it over TP and keep this CP rank's tokens.

    Returns:
        tokens, position_ids, labels, loss_mask: [b, s / CP]; attention_mask: [b, 1, s / CP, s].
        None for what this pipeline stage does not read.
    """
    config = get_attr_wrapped_model(model, "config")
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    if not needs_batch(config, vp_stage):
        return dict.fromkeys(BATCH_KEYS)

    batch = training_doors.tp_batch(data_iterator, config, vp_stage)
    return training_doors.cp_batch({key: batch.get(key) for key in BATCH_KEYS})


def loss_func(loss_mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses that count.

    Args:
        loss_mask, losses: [b, s / CP].

    Returns:
        the sum, the number of tokens (int), and what Megatron averages for its log.
    """
    assert loss_mask is not None  # only the last stage, which has labels, computes a loss
    mask = loss_mask.flatten().float()
    loss = (losses.flatten().float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, rejected in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss, rejection_func=rejected, message=f"found {name} in the local loss", fatal=True
            )
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """Run one micro-batch, or lay out its schedule plan; returns the output and the function of its loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model)
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the train, validation and test sets of the given sizes."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    transformer = core_transformer_config_from_args(args)

    def build_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and needs_batch(transformer, vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0(f"> building the {kind.__name__} ...")
    return BlendedMegatronDatasetBuilder(kind, num_samples, build_here, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # built on every rank that needs it, not on TP rank 0


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of a pipeline group that hold word embeddings: first, MTP's, and last if it is tied."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def use_shipped_helpers() -> None:
    """Keep Megatron from running `make` on its data helpers: the wheel has them compiled, and no Makefile."""
    from megatron.core.datasets import utils

    makefile = Path(utils.__file__).with_name("Makefile")
    if not makefile.exists() and find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = lambda: None


def main(step: Callable[..., Any] = forward_step, at_end: Callable[[], None] | None = None) -> None:
    """Parse the command line and train.

    Args:
        step: the forward step; a caller may wrap `forward_step` to look at the model as it runs.
        at_end: called on every rank after training, while the process groups still exist.
    """
    from megatron_mhc.specs import gpt_mhc_spec, hybrid_mhc_spec

    use_shipped_helpers()
    hooks.check_uses(PRETRAIN_USES + SPEC_USES)
    hooks.require()  # also for --no-mhc, which should know an mHC checkpoint when it meets one

    def choose(args: argparse.Namespace) -> Any:
        check_args(args)
        hooks.require(fsdp=args.use_megatron_fsdp)
        if args.no_mhc:
            return None
        return gpt_mhc_spec if args.hybrid_layer_pattern is None else hybrid_mhc_spec

    training_doors.train(add_args, choose, datasets, step, embedding_ranks)
    if at_end is not None:
        at_end()
    finish()


def finish() -> None:
    """Close what Megatron leaves open: a process that ends in the midst of gloo's threads may abort."""
    if (writer := get_tensorboard_writer()) is not None:
        writer.close()
    if get_args().cuda_graph_impl != "none":
        release()
    torch.distributed.barrier()
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
