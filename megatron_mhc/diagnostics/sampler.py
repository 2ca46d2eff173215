"""Forward hooks that look at the connections of a running model; none is left when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.carried import options_of
from megatron_mhc.diagnostics.report import Report, reduce_samples, sublayer_names
from megatron_mhc.gated import GatedConnection
from megatron_mhc.graphs import eagerly
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import reference


@dataclass(frozen=True)
class Sample:
    """One connection's mappings and streams, of T sampled tokens; fp64 but for the logits.

    Args:
        h_pre, h_post: [T, n]. h_res: [T, n, n].
        gram: [T, n, n], inner products of the streams that the connection read.
        logits: [T, size] of each dynamic part, `pre`, `post` and `res`, in the coefficient dtype.
        alphas: [1] of each dynamic part.
    """

    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor
    gram: Tensor
    logits: dict[str, Tensor]
    alphas: dict[str, Tensor]


class Sampler:
    """Samples every connection of a model while the `with` block is open, at its first call.

    The first call is that of the first micro-batch; gradient accumulation, recomputation in the
    backward pass and re-runs of a step call again and are ignored. Work is queued on the device, and
    nothing is copied to the host.

    Args:
        model: a model, or the list of model chunks that Megatron returns; may be wrapped. A pipeline
            stage without decoder layers has no connections and samples nothing.
        config: the model's transformer config.
        tokens: how many tokens of a micro-batch to sample, over all its sequence and context shards;
            evenly spaced. None is `--mhc-log-tokens`.

    Raises:
        ValueError: a model without mHC, or no tokens.
    """

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], config: TransformerConfig, tokens: int | None = None
    ):
        mhc = options_of(model, config)
        if mhc is None:
            raise ValueError("the model has no mHC: build it with a spec of megatron_mhc.specs")
        tokens = mhc.log_tokens if tokens is None else tokens
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: sample at least 1")
        self.model, self.mhc, self.config = model, mhc, config
        self.connections = connections(model)
        shards = config.context_parallel_size
        if config.sequence_parallel:
            shards *= config.tensor_model_parallel_size
        # The same on all ranks, so that pipeline stages exchange blocks of one size.
        self.capacity = max(1, tokens // shards)
        self.names = sublayer_names(config, mhc, hybrid_pattern(model))
        self.samples: dict[int, Sample] = {}
        self._hooked = ExitStack()

    def __enter__(self) -> Sampler:
        self._hooked.enter_context(hooked(self.model, self.connections, self._hook))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooked.close()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        assert isinstance(module, HyperConnectionModule)
        if module.sublayer_index not in self.samples and args[0].numel():
            with torch.no_grad():
                sample = take(module, args[0], output[1], self.capacity)
            self.samples[module.sublayer_index] = sample

    def report(self) -> Report:
        """Reduce over all ranks, each of which must call it.

        Raises:
            ValueError: a connection that has not run.
        """
        missing = [c.sublayer_index for c in self.connections if c.sublayer_index not in self.samples]
        if missing:
            raise ValueError(f"sub-layers {missing} did not run: run the model inside the sampler's block")
        return reduce_samples(self.samples, self.config, self.mhc, self.capacity, self.names)


@contextmanager
def hooked(
    model: nn.Module | Sequence[nn.Module], found: list[HyperConnectionModule], hook: Callable[..., None]
) -> Iterator[None]:
    """Call a forward hook on these connections of a model, whose layers then run without CUDA graphs."""
    handles = [connection.register_forward_hook(hook) for connection in found]
    try:
        with eagerly(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def connections(model: nn.Module | Sequence[nn.Module]) -> list[HyperConnectionModule]:
    """The mHC connections of a model or of a list of model chunks."""
    chunks = [model] if isinstance(model, nn.Module) else model
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnectionModule)]


def hybrid_pattern(model: nn.Module | Sequence[nn.Module]) -> str | None:
    """The symbols of a HybridModel's layers, those of all stages; None of a GPT."""
    for module in (model if isinstance(model, nn.Module) else model[0]).modules():
        if (pattern := getattr(module, "hybrid_layer_pattern", None)) is not None:
            from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

            return parse_hybrid_pattern(pattern).main_pattern.replace(Symbols.PIPE, "")
    return None


def take(connection: HyperConnectionModule, streams: Tensor, mappings: Any, capacity: int) -> Sample:
    """Keep at most `capacity` evenly spaced tokens of what a connection read and computed.

    Args:
        streams: [s, b, n*C]. mappings: of all s*b tokens, with h_pre, h_post, h_res.
    """
    n = connection.mhc.num_residual_streams
    s, b, _ = streams.shape
    every = slice(None, None, -(-s * b // capacity))
    x = reference.by_token(streams.detach(), n)[every]
    # Copies, also of fp64: recomputation may empty the originals, and the optimizer changes alphas.
    h_pre, h_post, h_res = (
        getattr(mappings, name).detach()[every].to(torch.float64, copy=True)
        for name in ("h_pre", "h_post", "h_res")
    )
    parts = [part for part, on in connection.dynamic.items() if on]
    alphas = {
        part: alpha.detach().to(torch.float64, copy=True)
        for part, alpha in zip(("pre", "post", "res"), connection.alphas, strict=True)
        if alpha is not None
    }
    if isinstance(connection, GatedConnection):
        logits = connection.logits(x)
    elif connection.mhc.is_hc:  # no map between its logits and its mappings
        whole = {"pre": h_pre, "post": h_post, "res": h_res.flatten(1)}
        logits = {part: whole[part] for part in parts}
    else:
        logits = mapping_logits(connection, x, parts)
    wide = x.double()
    return Sample(h_pre, h_post, h_res, wide @ wide.transpose(1, 2), logits, alphas)


def mapping_logits(connection: HyperConnectionModule, x: Tensor, parts: list[str]) -> dict[str, Tensor]:
    """The inputs of the sigmoids and of Sinkhorn, by part, for streams x: [T, n, C]."""
    if not parts:
        return {}
    n = connection.mhc.num_residual_streams
    # Not called like a module: a wrapper that gathers parameters has done so for the forward pass.
    weight = connection.mapping_proj.weight
    logits = reference.mapping_logits(x, weight, connection.alphas, connection.bias, connection.mhc.norm_eps)
    sizes = {"pre": n, "post": n, "res": n * n}
    return dict(zip(parts, logits.split([sizes[part] for part in parts], dim=-1), strict=True))


@contextmanager
def capture_h_res(model: nn.Module | Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the H_res of every sub-layer that runs inside the `with` block, in order.

    Meant for evaluation: recomputation in a backward pass would run, and collect, a layer twice.

    Args:
        model: a model, or the list of model chunks that Megatron returns; may be wrapped.

    Yields:
        a list that grows by one detached [T, n, n] per sub-layer and forward pass.

    Raises:
        ValueError: a model without mHC.
    """
    found = connections(model)
    if not found:
        raise ValueError("the model has no mHC connections: build it with a spec of megatron_mhc.specs")
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output[1].h_res.detach())

    with hooked(model, found, hook):
        yield captured
