"""Whatever config a block is built with gets the mHC options of its spec; a target of --spec makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.carried import SpecOfBlock, StreamsBlockSubmodules, remember


def remember_when_built(get_submodules: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_block_submodules`, which a block calls with its own config and the spec it is built from."""

    def get_and_remember(config: Any, spec: Any, vp_stage: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(spec, SpecOfBlock):
            spec = spec.of_block(config, vp_stage)
        submodules = get_submodules(config, spec, vp_stage, *args, **kwargs)
        if isinstance(submodules, StreamsBlockSubmodules) and submodules.mhc is not None:
            remember(config, submodules.mhc)
        return submodules

    return get_and_remember
