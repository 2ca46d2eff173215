"""A model, its optimizer and its training step, for train.py."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import ON_GPU, compile_operations, make_config
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.specs import wrap_block_spec

PLAIN, LATE = ("vanilla", "again"), ("reference", "compile")
OPS = (*PLAIN, "triton", "triton-fused", "hopper", "hopper-linked", *LATE)
PAPER, LLAMA = (129280, 30), (128256, 32)  # tokens and layers of the whole models
WHOLE = {"dense": LLAMA, "moe": PAPER, "moe_ep8": PAPER}

Row = dict[str, Any]

logging.getLogger("megatron").setLevel(logging.ERROR)  # a line for every model and DDP


def vocabulary(model: str, layers: int, tiny: bool) -> int:
    """Its size for a few layers of a model, a multiple of 128."""
    tokens, whole = WHOLE[model]
    return 256 if tiny else 128 * math.ceil(tokens * layers / whole / 128)


class Trainer:
    """A model, its optimizer and the micro-batches of its step, as a row asks."""

    def __init__(self, row: Row, options: argparse.Namespace):
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        self.shape = (row["batch"], options.seq)
        tokens = vocabulary(row["model"], options.layers, options.tiny)
        model, self.config = build(row, options, tokens)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(self.config, settings, Float16Module(self.config, model.cuda()))
        adam = dict(optimizer="adam", lr=3e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95)
        adam |= dict(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**adam), [self.model])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.schedule = get_forward_backward_func()
        generator = torch.Generator().manual_seed(2)  # a few common tokens, which are soon learnt
        draws = torch.rand(options.micro_batches, row["batch"], options.seq + 1, generator=generator)
        self.data = [batch.cuda() for batch in (tokens * draws**4).long()]
        self.positions = torch.arange(options.seq, device="cuda").expand(self.shape).contiguous()

    def forward(self, batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        labels = batch[:, 1:].contiguous()

        def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = losses.float().mean()
            return loss, loss.detach().clone()

        return model(batch[:, :-1].contiguous(), self.positions, None, labels=labels), mean

    def step(self) -> tuple[Tensor, float]:
        """Train; returns the mean loss, which is not waited for, and the gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.schedule(
            forward_step_func=self.forward,
            data_iterator=iter(self.data),
            model=[self.model],
            num_microbatches=len(self.data),
            seq_length=self.shape[1],
            micro_batch_size=self.shape[0],
            forward_only=False,
        )
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return torch.stack(losses).mean(), float(norm)

    def close(self) -> None:
        """Free weights, gradients, optimizer state and the last graph.

        Dropping the trainer would not: DDP's hooks, what MoE's dispatcher keeps of a micro-batch and the
        optimizer's views of fp32 parameters make cycles through autograd's nodes, which nothing collects.
        """
        for module in self.model.modules():
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                for name, value in vars(dispatcher).items():
                    if isinstance(value, Tensor):
                        setattr(dispatcher, name, None)
        tensors = [*self.model.parameters(), *(p.main_grad for p in self.model.parameters())]
        for group in self.optimizer.param_groups:
            tensors += group["params"]
        for part in self.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)


def build(row: Row, options: argparse.Namespace, tokens: int) -> tuple[GPTModel, Any]:
    """The model of a row and its config."""
    fusion = dict(moe_permute_fusion=options.permute_fusion)
    config = make_config(row["model"], options.layers, options.tiny, **fusion)
    spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=ON_GPU, normalization="RMSNorm")
    if row["n"]:
        backend, _, boundary = ("reference" if row["ops"] in LATE else row["ops"]).partition("-")
        asked = dict(num_residual_streams=row["n"], recompute_layer_num=row["recompute"])
        spec = wrap_block_spec(spec, MHCConfig(backend=backend, boundary=boundary or "auto", **asked), config)
    untied = dict(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = GPTModel(config, spec, tokens, options.seq, **untied)
    for module in model.modules():
        # Not by config.gradient_accumulation_fusion, with which the head would ask for apex.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if row["ops"] == "compile" and isinstance(module, HyperConnectionModule):
            compile_operations(module)
    return model, config
