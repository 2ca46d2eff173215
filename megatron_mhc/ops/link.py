"""What one connection's post_res and the next one's pre leave for each other; `deferred` uses it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reader(NamedTuple):
    """The connection that reads what a post_res writes, for whose `pre` that works ahead.

    Args:
        weight: [M, n*C], its phi: Triton's post_res projects by it.
        rest: its bias, alphas and options, for `hopper.pre.post_res_pre`, which does all of its `pre`.
    """

    weight: Tensor
    rest: tuple[Tensor, tuple[Tensor, Tensor, Tensor], dict[str, Any]] | None = None

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.rest is None else (self.weight, self.rest[0], *self.rest[1])


class Written:
    """What a post_res leaves for the connection that reads its output, and gets back: df.

    Args:
        saved: [T, M+1] fp32 of `pre_forward`, bias [M] and alpha_post [1] of its connection.
    """

    def __init__(self, saved: Tensor, bias: Tensor, alpha_post: Tensor):
        self.saved = (saved, bias, alpha_post)
        self._made: tuple[Tensor, int, object, Tensor] | None = None
        self._ahead: tuple[int, list[tuple[Tensor, int]], Any] | None = None

    def work_ahead(self, out: Tensor, reader: Reader, made: Any) -> None:
        """Keep what was made of this output by the reader's parameters."""
        self._ahead = (out._version, [(t, t._version) for t in reader.parameters()], made)

    def take_ahead(self, x: Tensor, *parameters: Tensor) -> Any:
        """What was made of x, this output, if it was of these very values; else None.

        Args:
            parameters: phi, bias and alphas of the connection that reads x; of fewer it may have been made.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or x._version != ahead[0]:
            return None
        for now, (then, version) in zip(parameters, ahead[1], strict=False):
            if (now.data_ptr(), now.shape, now._version) != (then.data_ptr(), then.shape, version):
                return None
        return ahead[2]

    def fill(self, g: Tensor, df: Tensor) -> None:
        """Keep df, made of this g: the two of one launch."""
        self._made = (g, g._version, _stream(g), df)

    def take(self, g: Tensor) -> Tensor | None:
        """df of g, if it was made of this very g, unchanged, on the stream that is current now."""
        made, self._made = self._made, None
        if made is None or g.data_ptr() != made[0].data_ptr() or g.shape != made[0].shape:
            return None
        return made[3] if (g._version, _stream(g)) == made[1:3] else None


def _stream(tensor: Tensor) -> object:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
