"""The gated residual of Qwen4-Exp (`--mhc-preset qwen4_exp`): its connection, and its exit mixer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.mapping_parameters import MappingParameters, MappingProjection
from megatron_mhc.ops import gated, reference
from megatron_mhc.parallel import mark_replicated

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import Mappings


class NormWeight(nn.Module):
    """Holds w, what the norm of the streams has beyond 1; calling it returns `weight: [n*C]`."""

    def __init__(self, size: int, dtype: torch.dtype, device: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

    def forward(self) -> Tensor:
        return self.weight


class GatedRead(MappingParameters):
    """The parameters of a gated read, in the model's dtype, as ordinary linear layers have it.

    Parameters: `stream_norm.weight [n*C]`, `read_down.weight [r, n*C]`, `read_up.weight [n*C, r]`, and
    `inject.weight [n, n*C]` where the streams are written too; see `ops.gated`.
    """

    own_precision = False
    inject: MappingProjection | None

    def make_read(self, config: TransformerConfig, mhc: MHCConfig, writes: bool) -> None:
        """Make the parameters; matrices start by --init-method-std, and the norm's weight at 1."""
        n, rank = mhc.num_residual_streams, mhc.gated_rank
        width, where = n * config.hidden_size, (self.dtype, self.device)
        self.stream_norm = NormWeight(width, *where)
        self.read_down = MappingProjection(rank, width, *where)
        self.read_up = MappingProjection(width, rank, *where)
        self.inject = MappingProjection(n, width, *where) if writes else None
        # Also without `perform_initialization`: the file of a plain model's weights has none of these.
        for matrix in (self.read_down, self.read_up, self.inject):
            if matrix is not None:
                nn.init.normal_(matrix.weight, std=config.init_method_std)
        mark_replicated(self, config)

    def weights(self) -> gated.Weights:
        """Called, so that what gathers parameters sees the use."""
        inject = None if self.inject is None else self.inject()
        return gated.Weights(self.stream_norm(), self.read_down(), self.read_up(), inject)


class GatedConnection(GatedRead, HyperConnectionModule):
    """One gated residual around one sub-layer, in the place of a HyperConnectionModule.

    Its read normalises the streams, so no norm stands in front of F (`norm.fold`).

    Source: transformers 5.23, `Qwen4ExpTextGatedResidual`.
    """

    def make_parameters(self, config: TransformerConfig, mhc: MHCConfig) -> None:
        self.dynamic = {"pre": True, "post": True, "res": False}
        self.parts = {}
        self.make_read(config, mhc, writes=True)

    def coefficients(self, x: Tensor) -> reference.Coefficients:
        """Coefficients of the streams x: [T, n, C]; h_pre is the mean over the channels' gates."""
        return self._read(x)[1]

    def forward(self, streams: Tensor, h_pre: Tensor | None = None) -> tuple[Tensor, Mappings]:
        """As `HyperConnectionModule.forward`; the layer input has the dtype that F takes."""
        s, b, _ = streams.shape
        layer_input, coefficients = self._read(reference.by_token(streams, self.mhc.num_residual_streams))
        layer_input = reference.in_sequence(layer_input, s, b)
        if self.config.fp32_residual_connection:
            layer_input = layer_input.to(self.config.params_dtype)
        return layer_input, coefficients

    def _read(self, x: Tensor) -> tuple[Tensor, reference.Coefficients]:
        layer_input, h_pre, h_post = gated.read_lean(x, self.weights(), self.mhc.norm_eps)
        assert h_post is not None
        n = x.shape[1]
        h_res = torch.eye(n, dtype=h_post.dtype, device=h_post.device).expand(x.shape[0], n, n)
        return layer_input, reference.Coefficients(h_pre, h_post, h_res)

    def write(self, x: Tensor, f: Tensor, coefficients: reference.Coefficients) -> Tensor:
        return reference.write(x, f, coefficients.h_post)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """The inputs of the sigmoids, by part, of x: [T, n, C]: pre [T, n*C], post [T, n]."""
        # Not called like modules: a wrapper that gathers parameters has done so for the forward pass.
        assert self.inject is not None
        matrices = self.read_down.weight, self.read_up.weight, self.inject.weight
        weights = gated.Weights(self.stream_norm.weight, *matrices)
        of_gate, of_inject = gated.logits(gated.stream_norm(x, weights.norm, self.mhc.norm_eps), weights)
        assert of_inject is not None
        return {"pre": of_gate.flatten(1), "post": of_inject}


class ExitMixer(GatedRead):
    """The contraction of the gated residual: its read, without a write, in the place of the final norm."""

    replaces_norm = True

    def __init__(self, config: TransformerConfig, mhc: MHCConfig):
        super().__init__(config, mhc)
        self.make_read(config, mhc, writes=False)

    def forward(self, streams: Tensor) -> Tensor:
        """Contract streams: [s, b, n*C] to [s, b, C]."""
        s, b, _ = streams.shape
        x = reference.by_token(streams, self.mhc.num_residual_streams)
        layer_input = gated.read_lean(x, self.weights(), self.mhc.norm_eps).layer_input
        return reference.in_sequence(layer_input, s, b)
