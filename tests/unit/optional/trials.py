"""What child.py tries once Megatron is imported: hooks, specs, optimizers, checkpoints."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig, transformer_block
from megatron.core.transformer.module import Float16Module
from torch.distributed.checkpoint import CheckpointException

import megatron_mhc
from megatron_mhc import MHCConfig
from megatron_mhc.hooks.targets import HOOKS
from megatron_mhc.specs import wrap_block_spec

MHC = MHCConfig()
DENSE = MHCConfig(load_dense=True)
VOCABULARY, SEQUENCE, BATCH = 32, 8, 2
OPTIMIZERS = {"fp32": (False, False), "bf16": (True, False), "bf16 distributed": (True, True)}


def hooks() -> dict[str, bool]:
    """Whether registering replaces every symbol, the report names it, and reverting restores it."""

    def stored() -> list[Any]:
        found = []
        for hook in HOOKS:
            module, path = hook.target.split(":")
            owner: Any = import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            found.append(inspect.getattr_static(owner, name))
        return found

    before = stored()
    handle = megatron_mhc.register()
    replaced = all(new is not old for new, old in zip(stored(), before, strict=True))
    reported = all(hook.target in handle.report() for hook in HOOKS)
    handle.revert()
    return {"replaced": replaced, "reported": reported, "restored": stored() == before}


def chosen() -> dict[str, str]:
    """What Megatron took of apex and Transformer Engine."""
    return {
        "final norm": transformer_block.LayerNormImpl.__name__,
        "adam": distrib_optimizer.Adam.__module__,
    }


def build(mhc: MHCConfig | None, normalization: str, te: bool = False, **more: Any):
    """A GPTModel of two layers whose weights follow from their names, however the norms are fused."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        normalization=normalization,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **more,
    )
    spec: Any
    if te:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=normalization)
    if mhc is not None:
        spec = wrap_block_spec(spec, mhc, config)
    untied = dict(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, **untied)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "hyper_connection" not in name:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(0.2 * values)
    return model


def forward_backward(model: Any, number: int) -> torch.Tensor:
    """The mean loss on batch `number`, after its backward pass."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    labels = tokens[:, 1:].contiguous()
    loss = model(tokens[:, :-1].contiguous(), positions, mask, labels=labels).float().mean()
    loss.backward()
    return loss.detach()


class Training:
    """A model under DDP, and its optimizer."""

    def __init__(
        self,
        te: bool,
        bf16: bool,
        distributed: bool,
        mhc: MHCConfig | None = MHC,
        normalization: str = "LayerNorm",
    ):
        precision = dict(bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32)
        model = build(mhc, normalization, te, **precision)
        self.bare, config = model, model.config
        if bf16:
            model = Float16Module(config, model)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=bf16, use_distributed_optimizer=distributed
        )
        self.model = DistributedDataParallel(config, settings, model)
        adam = dict(optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, **precision)
        adam |= dict(use_distributed_optimizer=distributed)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**adam), [self.model])

    def step(self, number: int) -> list[float]:
        """Loss and gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = forward_backward(self.model, number)
        finalize_model_grads([self.model])
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return [loss.item(), float(norm)]

    def state(self, loading: bool = False) -> dict[str, Any]:
        metadata = dict(distrib_optim_sharding_type="fully_reshardable", dp_cp_group=data_parallel())
        metadata |= dict(chained_optim_avoid_prefix=True, singleton_local_shards=False)
        state = {"model": self.bare.sharded_state_dict(metadata=metadata)}
        options = dict(is_loading=loading, metadata=metadata)
        state["optimizer"] = self.optimizer.sharded_state_dict(state, **options)
        return state

    def load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self.state(loading=True), str(folder))
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def data_parallel() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def keys(tree: Any) -> list[str]:
    """Names under which a state is saved."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return sorted({key for branch in tree for key in keys(branch)})
    return [tree.key] if isinstance(tree, dist_checkpointing.ShardedTensor) else []


def runs(te: bool, resume: bool) -> dict[str, Any]:
    """Three steps with every optimizer; `resumed` is the third, after a checkpoint of the second."""
    import tempfile

    found = {}
    for name, (bf16, distributed) in OPTIMIZERS.items():
        training = Training(te, bf16, distributed)
        history = [training.step(number) for number in range(2)]
        found[name] = {"keys": keys(training.state()["optimizer"])}
        if resume or not distributed:  # Megatron's distributed optimizer needs a fused Adam to load
            with tempfile.TemporaryDirectory() as folder:
                dist_checkpointing.save(training.state(), folder)
                other = Training(te, bf16, distributed)
                other.load(Path(folder))
            found[name]["resumed"] = other.step(2)
        found[name]["history"] = [*history, training.step(2)]
    return found


def recompute(te: bool) -> bool:
    """Whether replaying the streams leaves loss and gradients as they are, bit for bit."""
    got = []
    for number in ("off", "2", "3"):
        model = build(MHCConfig(recompute_layer_num=number), "LayerNorm", te)
        loss = forward_backward(model, 0)
        got.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    return all(torch.equal(a, b) for other in got[1:] for a, b in zip(other, got[0], strict=True))


def checkpoints(folder: Path) -> dict[str, Any]:
    """Plain and mHC models, whose final norms both have an extra state, taking each other's checkpoints."""
    from megatron_mhc.convert.files import convert_files

    options = dict(te=True, bf16=False, distributed=False)
    plain, ours = Training(**options, mhc=None), Training(**options)
    for parameter in plain.bare.parameters():
        parameter.data.add_(0.01)
    for name, training in (("plain", plain), ("ours", ours)):
        training.step(0)
        (folder / name).mkdir()
        dist_checkpointing.save(training.state(), str(folder / name))

    def outcome(fn: Callable[..., Any], *args: Any) -> Any:
        try:
            return fn(*args)
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            return f"{type(error).__name__}: {error}"

    def same(other: Any) -> bool:
        mine = dict(other.named_parameters())
        return all(
            torch.equal(parameter, mine[name.replace("final_layernorm.", "final_layernorm.norm.")])
            for name, parameter in plain.bare.named_parameters()
        )

    def take(mhc: MHCConfig, source: Path) -> bool:
        model = build(mhc, "LayerNorm", te=True)
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source))
        model.load_state_dict(state["model"])
        return same(model)

    def take_in_torch_format() -> bool:
        model = build(DENSE, "LayerNorm", te=True)
        model.load_state_dict(plain.bare.state_dict())
        return same(model)

    def convert() -> bool:
        options = "num_residual_streams=4"
        convert_files("plain", "plugin", folder / "plain", folder / "converted", options=options)
        return take(MHC, folder / "converted" / "plain")

    return {
        "plain resumes": outcome(plain.load, folder / "plain"),
        "plain takes mHC": outcome(plain.load, folder / "ours"),
        "mHC resumes": outcome(ours.load, folder / "ours"),
        "mHC takes plain": outcome(take, MHC, folder / "plain"),
        "told to": outcome(take, DENSE, folder / "plain"),
        "told to, in the torch format": outcome(take_in_torch_format),
        "converted": outcome(convert),
    }
