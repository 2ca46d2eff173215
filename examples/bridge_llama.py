"""Fine-tune a Hugging Face Llama with mHC by Megatron-Bridge 0.6: docs/bridge.md.

    torchrun --nproc-per-node 8 examples/bridge_llama.py --hf meta-llama/Llama-3.2-1B --out run/ \
        --data my_corpus_text_document

Without --data it trains on Bridge's mock data. A second call with more --steps goes on from run/checkpoints,
which `python -m megatron_mhc.export --load run/checkpoints --out folder/` makes a folder for transformers of.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def recipe(
    hf: str, out: str, steps: int, data: str | None = None, sequence: int = 4096, mhc: str = ""
) -> Any:
    """Bridge's ConfigContainer of what it trains.

    Args:
        hf: a Hugging Face folder or name, of the weights to start from and of the tokenizer.
        mhc: options, as `num_residual_streams=4`; `off` leaves the model plain.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as bridge
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_mhc.bridge import use_mhc

    model = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
    model.seq_length = sequence
    if mhc != "off":
        use_mhc(model, **dict(pair.split("=") for pair in mhc.split(",") if pair))
    checkpoints = os.path.join(out, "checkpoints")
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(train_iters=steps, global_batch_size=32, micro_batch_size=1),
        validation=bridge.ValidationConfig(eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=2e-5, min_lr=2e-6, adam_beta2=0.95, use_distributed_optimizer=True
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine", lr_decay_iters=steps, start_weight_decay=0.1, end_weight_decay=0.1
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=bridge.GPTDatasetConfig(
            seq_length=sequence,
            data_path=data,
            dataloader_type="single",
            split="1,0,0",
            random_seed=1234,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
        ),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf),
        checkpoint=bridge.CheckpointConfig(save=checkpoints, load=checkpoints, save_interval=500),
        logger=bridge.LoggerConfig(log_interval=10, tensorboard_dir=os.path.join(out, "tensorboard")),
        mixed_precision="bf16_mixed",
    )


def main(*arguments: str, adapt: Any = None, watch: Any = None) -> None:
    """Train by the command line; a test adapts the recipe to a CPU, and watches by its own callbacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face folder or name of the first weights")
    parser.add_argument("--out", required=True, help="folder of checkpoints and TensorBoard")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--data", help="prefix of a Megatron data set; default: mock data")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--mhc", default="", help="num_residual_streams=4,...; off: the plain model")
    given = parser.parse_args(arguments or None)
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_mhc.bridge import MHCDiagnostics

    config = recipe(**vars(given))
    if adapt is not None:
        adapt(config)
    if watch is None:
        watch = [] if given.mhc == "off" else [MHCDiagnostics(log_interval=10)]
    pretrain(config, forward_step, callbacks=watch)


if __name__ == "__main__":
    main()
