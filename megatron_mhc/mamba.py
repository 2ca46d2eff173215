"""The Mamba layer with mHC instead of its residual addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mhc import norm, parallel
from megatron_mhc.carried import remember
from megatron_mhc.chunk import ModelChunks
from megatron_mhc.config import MHCConfig
from megatron_mhc.graphs import Held
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.layer import BetweenStreams
from megatron_mhc.sublayer import mixer


class HyperConnectionMambaLayer(BetweenStreams, MambaLayer):
    """A MambaLayer between n residual streams: streams -> pre -> norm and mixer -> post_res -> streams.

    Args:
        chunks: shared by the layers of a model chunk; a layer without makes a chunk of its own.

    Raises:
        ValueError: a configuration that mHC does not support (see `parallel.validate`, `layer_refusals`).

    Source: arXiv 2512.24880 Eq. (3).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int = 1,
        *,
        mhc: MHCConfig,
        chunks: ModelChunks | None = None,
        **kwargs: Any,
    ):
        parallel.validate(config, mhc)
        remember(config, mhc)
        super().__init__(config, norm.fold_mixer(submodules, mhc), layer_number, **kwargs)
        self.mhc = mhc
        chunks = chunks or ModelChunks(config, mhc, layers=1, each=1)
        self.mixer_hyper_connection = self.connection("mixer", 0, chunks)
        self.join(chunks, Held())

    def parts(self) -> list[tuple[HyperConnectionModule, Callable[..., Tensor]]]:
        """Its mixer's connection."""
        assert self.mixer_hyper_connection is not None
        return [(self.mixer_hyper_connection, mixer)]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Run the layer.

        Args:
            hidden_states: [s, b, n*C] streams; [s, b, C] embeddings in the model's first layer.
            args, kwargs: as in MambaLayer.forward.

        Returns:
            [s, b, n*C] streams.
        """
        streams, _ = self.run(hidden_states, args, kwargs)
        return streams
