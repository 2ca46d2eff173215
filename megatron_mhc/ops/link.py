"""What a post_res and the `pre` that reads its output do for each other (`autograd`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.ops.kernels import Kernels
from megatron_mhc.ops.options import Form, Handed, HandedBack, Options, ReadNorm


class Saved(NamedTuple):
    """What h_post is made of again: `saved` [T, M+1] of `pre_forward`, and affine; fp32."""

    projection: Tensor
    affine: Tensor


class NextPre(NamedTuple):
    """The `pre` of the next connection, for which a post_res works ahead."""

    kernels: Kernels
    weight: Tensor
    affine: Tensor
    options: Options
    norm: ReadNorm | None = None
    h_pre: Tensor | None = None  # [T, n] fp32, what the writer has handed on to read with


def made_by(pre: NextPre) -> tuple[Tensor, ...]:
    """The tensors that all which it returns is made of, besides the streams and its norm."""
    return (pre.weight, pre.affine) if pre.h_pre is None else (pre.weight, pre.affine, pre.h_pre)


def handed_to(h_pre: Tensor | None) -> Handed | None:
    """What `pre` needs to read with h_pre: [T, n], if it is to."""
    return None if h_pre is None else Handed(h_pre, torch.empty_like(h_pre))


def handed_back(h_pre: Tensor | None, d_on: Tensor | None) -> HandedBack | None:
    """The same for its backward; d_on: the gradient of what it has handed on."""
    if h_pre is None:
        return None
    return HandedBack(h_pre, None if d_on is None else d_on.contiguous(), torch.empty_like(h_pre))


class Projected(NamedTuple):
    """What `post_res_project` makes for the next `pre`: parts of a projection, and maybe its layer input."""

    parts: Tensor
    layer_input: Tensor | None


class _NoNode:
    """The ctx of a forward pass behind which there is no backward."""

    def save_for_backward(self, *_: Any) -> None: ...

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def set_materialize_grads(self, *_: Any) -> None: ...


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`; without gradients its forward alone, since a node costs the host more than that."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_NoNode(), *args)


def version(tensor: Tensor) -> int | None:
    """How often it was written in place; None of a tensor of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


class Ahead:
    """What was made of a post_res's output by parameters of the `pre` that reads it, for that `pre`."""

    def __init__(self, out: Tensor, made_by: tuple[Tensor, ...], made: Any, norm: ReadNorm | None = None):
        self._version, self._settings = version(out), norm and norm[1:]
        of_norm = () if norm is None else (norm.weight,)
        self._made_by = [(t, version(t)) for t in (*of_norm, *made_by)]
        self._made = made

    def take(self, x: Tensor, *parameters: Tensor, norm: ReadNorm | None = None) -> Any:
        """What was made of x, this output, if it was of these very values; once, else None.

        Args:
            parameters: phi and affine of the connection that reads x, and the h_pre that it was handed, if
                any; of fewer it may have been made.
            norm: that its `pre` computes too.
        """
        made, self._made = self._made, None
        if version(x) != self._version or (norm and norm[1:]) != self._settings:
            return None
        of_norm = () if norm is None else (norm.weight,)
        for now, (then, its_version) in zip((*of_norm, *parameters), self._made_by, strict=False):
            if version(now) != its_version:
                return None
            if now is not then and (now.data_ptr(), now.shape) != (then.data_ptr(), then.shape):
                return None
        return made


class Link:
    """Joins a post_res with the `pre` that reads its output.

    Forward, it brings that `pre` what post_res made ahead: a projection in parts, or all that `pre_forward`
    returns; backward, it brings post_res its df.
    """

    def __init__(self, writer: Saved, form: Form):
        self.writer, self.form = writer, form
        self.ahead: Ahead | None = None
        self._df: tuple[Tensor, int, int | None, Tensor] | None = None

    def put_df(self, g: Tensor, df: Tensor) -> None:
        """Keep df, made of this g: the two of one launch."""
        self._df = (g, g._version, _stream(g), df)

    def take_df(self, g: Tensor) -> Tensor | None:
        """df of g, if it was made of this very g, unchanged, on the stream that is current now."""
        kept, self._df = self._df, None
        if kept is None or g.data_ptr() != kept[0].data_ptr() or g.numel() != kept[0].numel():
            return None
        return kept[3] if (g._version, _stream(g)) == kept[1:3] else None


def _stream(tensor: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else None


# Nodes of the autograd graph that hand a gradient on as it is: reshapes, and Megatron's make_viewless_tensor.
_PASSING = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "MakeViewlessTensorBackward")


def link_of(x: Tensor) -> Link | None:
    """The link of the post_res that made x, or None if something else did."""
    node = x.grad_fn
    while node is not None and node.name() in _PASSING:
        node = node.next_functions[0][0]
    return getattr(node, "link", None)
