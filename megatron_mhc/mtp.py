"""Multi-token prediction between n streams, as DeepSeek-V4 has it (`--mhc-mtp multistream`).

    streams [s, b, n*C] of the decoder, or of the depth before
      x_i = h_proj(hnorm(stream_i)) + e_proj(enorm(embedding of the next token)),   i = 1 .. n
      streams = a transformer layer with mHC between the x_i
      output [s, b, C] = final norm(contraction of the streams), of this depth alone

Megatron's own (`single`) reads the decoder's output [s, b, C], and its layer is a plain one. In both,
Megatron's class rolls the tokens, runs the layer and recomputes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.config import MHCConfig
from megatron_mhc.layer import viewless
from megatron_mhc.parallel import streams_dtype
from megatron_mhc.streams import contract_norm_builder, take_streams
from megatron_mhc.wrapping import model_chunks, wrap_layer_spec


class Projections(nn.Module):
    """What Megatron builds where it wants one linear [2C, C]: two of [C, C]."""

    def __init__(self, input_size: int, output_size: int, *, linear: Any, name: Any = None, **options: Any):
        super().__init__()
        del input_size
        for part in ("e_proj", "h_proj"):
            named = dict(name=name.replace("eh_proj", part) if name else None)
            options |= dict(tp_comm_buffer_name=f"mtp_{part}")
            setattr(self, part, build_module(linear, output_size, output_size, **options, **named))


class MultistreamPredictionLayer(MultiTokenPredictionLayer):
    """One depth: Megatron's, between n streams.

    Parameters: `enorm`, `hnorm`, `e_proj.weight [C, C]`, `h_proj.weight [C, C]`, `mtp_model_layer`, and the
    contraction and norm `final_layernorm`.

    Args:
        mhc: mHC options; the rest is Megatron's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        *args: Any,
        mhc: MHCConfig,
        **kwargs: Any,
    ):
        projections = ModuleSpec(module=Projections, params=dict(linear=submodules.eh_proj))
        super().__init__(config, dataclasses.replace(submodules, eh_proj=projections), *args, **kwargs)
        self.e_proj, self.h_proj = self.eh_proj.e_proj, self.eh_proj.h_proj
        del self.eh_proj
        self.mhc = mhc

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Run the depth.

        Args:
            args, kwargs: as in MultiTokenPredictionLayer.forward, `hidden_states` are streams [s, b, n*C].

        Returns:
            output [s, b, C], streams [s, b, n*C], then ids, positions and padding mask for the next depth.
        """
        streams, *rolled = super().forward(*args, **kwargs)
        # Outside of Megatron's checkpoint of the rest: the next depth reads the streams.
        output = viewless(self.final_layernorm(streams))
        return output, streams, *rolled

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        """Streams [s, b, n*C] and embeddings [s, b, C], which become streams."""
        n, width = self.mhc.num_residual_streams, self.config.hidden_size
        of_streams = self.hnorm(hidden_states.reshape(len(hidden_states), hidden_states.shape[1] * n, width))
        e, _ = self.e_proj(self._for_linear(self.enorm(decoder_input)))
        h, _ = self.h_proj(self._for_linear(of_streams))
        mixed = h.view(*e.shape[:2], n, e.shape[2]) + e.unsqueeze(2)  # [s, b, n, C / tp]
        if self.sequence_parallel:
            # Megatron gathers and scatters one stream; n of them are too many bytes for that.
            mixed = all_to_all_hp2sp(mixed, group=self.tp_group)
        else:
            mixed = gather_from_tensor_model_parallel_region(mixed, group=self.tp_group)
        return mixed.view(-1, e.shape[1], n * width).to(streams_dtype(self.config))

    def _for_linear(self, normed: Tensor) -> Tensor:
        return normed.to(self.config.params_dtype) if self.config.fp32_residual_connection else normed

    def _postprocess(self, hidden_states: Tensor) -> Tensor:
        """The layer's streams as they are: `forward` contracts them."""
        return viewless(hidden_states)

    def forward_single_position(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse speculative decoding, which has kept the contracted hidden states alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "speculative decoding (num_speculative_tokens) does not support --mhc-mtp multistream, whose "
            "layers read n streams: decode without it, or train with --mhc-mtp single"
        )


def between_streams(
    submodules: MultiTokenPredictionBlockSubmodules, config: TransformerConfig, mhc: MHCConfig
) -> MultiTokenPredictionBlockSubmodules:
    """The submodules of a block of multi-token prediction, of plain layers, with `multistream` ones.

    Raises:
        ValueError: a depth of another class than Megatron's, or a layer that mHC cannot wrap.
    """
    chunks = model_chunks(config, mhc, layers=1)

    def depth(spec: ModuleSpec) -> ModuleSpec:
        if spec.module is MultistreamPredictionLayer:
            return spec
        if spec.module is not MultiTokenPredictionLayer:
            name = getattr(spec.module, "__name__", spec.module)
            raise ValueError(
                f"--mhc-mtp multistream cannot wrap {name}: it wraps megatron.core's "
                "MultiTokenPredictionLayer; use --mhc-mtp single"
            )
        parts = dataclasses.replace(
            spec.submodules,
            mtp_model_layer=wrap_layer_spec(spec.submodules.mtp_model_layer, mhc, chunks),
            layer_norm=contract_norm_builder(spec.submodules.layer_norm, mhc),
        )
        return dataclasses.replace(
            spec, module=MultistreamPredictionLayer, params={**spec.params, "mhc": mhc}, submodules=parts
        )

    return dataclasses.replace(submodules, layer_specs=[depth(spec) for spec in submodules.layer_specs])


def predict(
    block: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor,
    padding_mask: Tensor | None = None,
    extra_block_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Forward of a MultiTokenPredictionBlock of MultistreamPredictionLayers.

    Args:
        hidden_states: [s, b, C], the decoder's output, with which its streams came (`streams.take_streams`).
        kwargs: as in MultiTokenPredictionBlock.forward.

    Returns:
        [(1 + depths) * s, b, C]: the decoder's output and those of the depths.
    """
    streams = take_streams(hidden_states)
    outputs = [hidden_states]
    if getattr(block.config, "mtp_detach_heads", False):  # 0.18 has no such option
        streams = streams.detach()
    for depth in range(block.config.mtp_num_layers):
        layer = block.layers[0 if block.mtp_use_repeated_layer else depth]
        # A view: what recomputes the layer may take its input's memory, and others read the streams too.
        output, streams, input_ids, position_ids, padding_mask = layer(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=streams.view_as(streams),
            attention_mask=attention_mask,
            padding_mask=padding_mask,
            **kwargs,
            **(extra_block_kwargs or {}),
        )
        outputs.append(output)
    return torch.cat(outputs)
