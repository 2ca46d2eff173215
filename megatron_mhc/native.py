"""The kernels under the mHC that Megatron brings itself, in its branch `dev`: `accelerate`.

    model = accelerate(model)        # in the script's model_provider

Megatron's layers, flags, checkpoints, schedules and recompute stay. Its connections call other kernels:

    forward                  mappings and layer input, one operation     `autograd.pre`
    fused_h_res_h_post_bda   H_res^T x + H_post (F(l) + bias)            `autograd.post_res`

The arithmetic is the preset deepseek_v4, which Megatron's is too, with two differences below bf16's rounding.
Coefficients stay fp32, where Megatron rounds them to the streams' dtype. The norm divides by
sqrt(mean(x^2) + 1e-12), where Megatron divides by rms(x) + 1e-6: that is 1e-6 / rms(x) apart in relative
terms, and nothing for a token of zeros.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from megatron_mhc.backend import Backend, hopper_obstacle, triton_obstacle
from megatron_mhc.config import MHCConfig
from megatron_mhc.refusals import Refusal, refuse, setting_row

if TYPE_CHECKING:
    from megatron_mhc.ops.kernels import Kernels

EPS = 1e-6  # of the norm, of h_pre and of Sinkhorn-Knopp
_WHERE = "megatron.core.transformer.hyper_connection"
# What Megatron's layers call.
_CALLED = {
    "forward": ("self", "hidden_states", "mhc_recompute_manager", "output_slot"),
    "fused_h_res_h_post_bda": (
        "self", "h_res", "original_residual", "h_post", "layer_output_with_bias", "dropout_prob", "training",
        "fused", "manager",
    ),
}  # fmt: skip
_OUTPUTS = 4  # of forward: layer input, h_res, h_post, residual
_LEAVE_OUT = "or leave accelerate() out"
_ROWS: tuple[Refusal, ...] = (
    setting_row(
        "hidden_dropout", f"the kernels have no dropout; set it to 0, {_LEAVE_OUT}",
        what="accelerate() does not support {flag} {value}",
    ),
    setting_row(
        "overlap_moe_expert_parallel_comm",
        f"its schedule cuts the graph between mHC's two halves; leave it out, {_LEAVE_OUT}",
        what="accelerate() does not support {flag}",
    ),
    setting_row(
        "cuda_graph_impl", f"a graph may end between mHC's two halves; set none, {_LEAVE_OUT}",
        refused=lambda value: value not in (None, "none"),
        what="accelerate() does not support {flag} {value}",
    ),
)  # fmt: skip


def accelerate[Model: torch.nn.Module](model: Model, backend: str = "auto") -> Model:
    """Have Megatron's own connections in a model compute by the plugin's kernels, and return the model.

    A second call sets the back end anew.

    Args:
        model: of --enable-hyper-connections; a GPTModel or a HybridModel, wrapped or not.
        backend: `hopper` or `triton`; `auto` takes the best that can serve.

    Raises:
        ValueError: this Megatron has no mHC of its own, or another than this is written for; the model has
            none, or a setting that is refused. In a forward pass: no kernels can serve the streams.
    """
    if backend not in ("auto", "hopper", "triton"):
        raise ValueError(f"accelerate(backend={backend!r}): give auto, hopper or triton")
    theirs = _connection_of_megatron()
    found = [
        module
        for module in model.modules()
        if type(module) is theirs or isinstance(module, theirs) and hasattr(module, "mhc_backend")
    ]
    # A pipeline stage may have no layer, only the embedding or the loss.
    if not found and not any(
        getattr(getattr(module, "config", None), "enable_hyper_connections", False)
        for module in model.modules()
    ):
        raise ValueError(
            "accelerate(): no connection in this model; build it with --enable-hyper-connections"
        )
    for module in found:
        refuse(_ROWS, module.config)
        if {module.norm_eps, module.sinkhorn_eps, module.compute_h_eps} != {EPS}:
            raise ValueError(f"accelerate(): a connection's eps is not {EPS}, which the kernels have")
    for module in found:
        module.__class__ = _accelerated(theirs, backend)
    return model


def _connection_of_megatron() -> Any:
    """Megatron's HyperConnectionModule.

    Raises:
        ValueError: there is none, or its methods are called otherwise.
    """
    try:
        from megatron.core.transformer.hyper_connection import (  # type: ignore[import-not-found]
            HyperConnectionModule,
        )
    except ImportError as error:
        raise ValueError(
            f"accelerate(): this Megatron has no {_WHERE}; it takes the plugin's own layers, by "
            "--spec megatron_mhc.specs gpt_mhc_spec"
        ) from error
    for name, expected in _CALLED.items():
        found = tuple(inspect.signature(getattr(HyperConnectionModule, name)).parameters)
        if found != expected:
            raise ValueError(
                f"accelerate(): {_WHERE}.HyperConnectionModule.{name} takes {', '.join(found)}, not "
                f"{', '.join(expected)}; this Megatron is not the one that megatron_mhc.native is written for"
            )
    outputs = inspect.signature(HyperConnectionModule.forward, eval_str=True).return_annotation
    if len(get_args(outputs)) != _OUTPUTS:
        raise ValueError(
            f"accelerate(): {_WHERE}.HyperConnectionModule.forward returns {outputs}, not {_OUTPUTS} "
            "tensors; this Megatron is not the one that megatron_mhc.native is written for"
        )
    return HyperConnectionModule


@functools.cache
def _accelerated(theirs: Any, backend: str) -> type[torch.nn.Module]:
    """Megatron's connection with the operations of the plugin; its parameters and their names stay."""

    class AcceleratedHyperConnection(theirs):
        mhc_backend = backend

        def __reduce__(self) -> tuple[Any, ...]:
            # A pickle finds no class of a function, but the function.
            return _empty, (theirs, backend), self.__getstate__()

        def forward(
            self,
            hidden_states: Tensor,
            mhc_recompute_manager: Any = None,
            output_slot: Any = None,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            if output_slot is not None:
                raise RuntimeError("accelerate() does not serve graphs that --recompute-modules mhc feeds")
            return _pre(self, backend, hidden_states, mhc_recompute_manager)

        def fused_h_res_h_post_bda(
            self,
            h_res: Tensor,
            original_residual: Tensor,
            h_post: Tensor,
            layer_output_with_bias: tuple[Tensor, Tensor | None],
            dropout_prob: float,
            training: bool,
            fused: bool,
            manager: Any = None,
        ) -> Tensor:
            if training and dropout_prob:
                raise RuntimeError(f"accelerate() has no kernels for a dropout of {dropout_prob}")
            return _post_res(h_res, layer_output_with_bias, manager)

    return AcceleratedHyperConnection


def _empty(theirs: Any, backend: str) -> torch.nn.Module:
    """A connection without values, which unpickling gives them."""
    kind = _accelerated(theirs, backend)
    return kind.__new__(kind)


@functools.cache
def _backend(n: int, iterations: int, backend: str) -> Backend:
    return Backend(
        MHCConfig(
            num_residual_streams=n, preset="deepseek_v4", sinkhorn_iterations=iterations, backend=backend
        )
    )


def _kernels(n: int, iterations: int, backend: str, x: Tensor) -> Kernels:
    chosen, width = _backend(n, iterations, backend), x.shape[-1] // n
    kernels = chosen.kernels(x, width)
    if kernels is None:
        kind = chosen.mhc, width, x.dtype, x.device.type
        obstacle = triton_obstacle(*kind) or hopper_obstacle(*kind)
        raise ValueError(f"accelerate() has no kernels for these streams: {obstacle}")
    return kernels


def _pre(
    connection: Any, backend: str, streams: Tensor, manager: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer input [s, b, C], h_res [s, b, n, n] and h_post [s, b, n] fp32, and the streams as they came."""
    from megatron_mhc.ops.autograd import pre
    from megatron_mhc.ops.options import Options

    s, b, _ = streams.shape
    n, iterations = connection.n, connection.sinkhorn_iterations
    kernels = _kernels(n, iterations, backend, streams)
    parts = connection.bias, connection.alpha_pre, connection.alpha_post, connection.alpha_res
    layer_input, mappings = pre(
        streams,
        connection.mapping_proj.weight.float(),
        torch.cat(parts).float(),
        Options(norm_eps=EPS**2, iterations=iterations, deepseek_v4=True),
        kernels,
        n,
    )
    x = streams.detach().reshape(s * b, n, streams.shape[-1] // n)
    if manager is not None:
        coefficients = mappings.coefficients
        _recomputed(manager, layer_input, lambda out: _read(x, coefficients, out))
    h_res = mappings.h_res.view(s, b, n, n)
    # Megatron's layers hand h_res on as it is, so what post_res takes travels with it.
    h_res.mhc_call = mappings, x  # type: ignore[attr-defined]
    return layer_input, h_res, mappings.h_post.view(s, b, n), streams


def _read(x: Tensor, coefficients: Tensor, out: Tensor) -> None:
    from megatron_mhc.ops.triton.replay import Connection, replay

    flat = out.view(x.shape[::2])
    replay(x, [Connection(coefficients, flat, flat)], behind=False)  # an f that is not read


def _post_res(h_res: Tensor, output: tuple[Tensor, Tensor | None], manager: Any) -> Tensor:
    """The next streams [s, b, n*C], of F's output [s, b, C] and its bias [C]."""
    from megatron_mhc.ops.autograd import post_res
    from megatron_mhc.ops.triton.post_res import post_res_forward

    if not hasattr(h_res, "mhc_call"):
        raise RuntimeError("accelerate(): h_res is not what this connection's forward returned")
    mappings, x = h_res.mhc_call
    f, bias = output
    streams = post_res(f, mappings, bias)
    if manager is not None:
        coefficients, flat = mappings.coefficients, f.detach().reshape(x.shape[::2])
        _recomputed(
            manager, streams, lambda out: post_res_forward(x, flat, coefficients, bias, out.view_as(x))
        )
    return streams


def _recomputed(manager: Any, output: Tensor, write: Callable[[Tensor], Any]) -> None:
    """Have a block of --recompute-modules mhc drop the output, and bring it back by `write`."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    nbytes = output.untyped_storage().nbytes()

    class Replayed(CheckpointWithoutOutput):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: tuple[Tensor, ...] = (output,)  # that the manager drops
            self.write: Callable[[Tensor], Any] = write

        def _recompute(self, _: Any) -> None:
            for dropped in self.outputs:
                dropped.untyped_storage().resize_(nbytes)
                with torch.no_grad():
                    self.write(dropped.detach())
                del self.write
            self.outputs = ()  # brought back

    manager.add_checkpoint(Replayed())
