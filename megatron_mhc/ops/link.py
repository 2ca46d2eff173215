"""What one connection's post_res and the next one's pre leave for each other; `deferred` uses it."""

import torch
from torch import Tensor


class Written:
    """What a post_res leaves for the connection that reads its output, and gets back: df.

    Args:
        saved: [T, M+1] fp32 of `pre_forward`, bias [M] and alpha_post [1] of its connection.
    """

    def __init__(self, saved: Tensor, bias: Tensor, alpha_post: Tensor):
        self.saved = (saved, bias, alpha_post)
        self._made: tuple[Tensor, int, object, Tensor] | None = None
        self._projected: tuple[int, Tensor, int, Tensor] | None = None

    def project(self, out: Tensor, weight: Tensor, parts: Tensor) -> None:
        """Keep the projection of this output by the next connection's phi."""
        self._projected = (out._version, weight, weight._version, parts)

    def take_parts(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The projection of x, this output, by `weight`, if it was made of these very values."""
        made, self._projected = self._projected, None
        if made is None or weight.data_ptr() != made[1].data_ptr() or weight.shape != made[1].shape:
            return None
        return made[3] if (x._version, weight._version) == (made[0], made[2]) else None

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
