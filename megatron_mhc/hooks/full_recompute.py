"""Megatron's full recompute of a block whose input carries no gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def ask_input_gradient(checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `checkpointed_forward`, whose layers get gradients only if their input asks for one.

    A frozen embedding's output does not: mappings trained alone would silently stay as they are.
    """

    def run(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mhc = getattr(self.config, "mhc", None) is not None
        if mhc and torch.is_grad_enabled() and not hidden_states.requires_grad:
            if any(parameter.requires_grad for parameter in self.parameters()):
                hidden_states = hidden_states.detach().requires_grad_()
        return checkpointed(self, hidden_states, *args, **kwargs)

    return run
