"""What the kernels of `pre` take besides tensors."""

from typing import NamedTuple

from torch import Tensor

READS, WRITES, MIXES = 1, 2, 4  # h_pre, h_post and H_res
BITS = {"pre": READS, "post": WRITES, "res": MIXES}


class Form(NamedTuple):
    """Which coefficients are learned, and what h_post is.

    Args:
        parts: the sum of READS, WRITES and MIXES of those that are. The others are the constants 1/n, 1 and
            I; they have no rows in projections, `saved` and coefficients, and nothing is loaded for them.
        post_magnitude, post_eps: h_post = magnitude * sigma(.) + eps.
    """

    parts: int = READS + WRITES + MIXES
    post_magnitude: float = 2.0
    post_eps: float = 0.0

    def rows(self, n: int) -> int:
        """M, the mapping rows: n of h_pre, n of h_post, n*n of H_res, of those that are learned."""
        learned = (self.parts & READS, self.parts & WRITES, self.parts & MIXES)
        return sum(size for size, on in zip((n, n, n * n), learned, strict=True) if on)


class Options(NamedTuple):
    """Settings of one connection's kernels.

    Args:
        norm_eps: added to mean(x^2) inside the root of the norm.
        iterations: of Sinkhorn-Knopp.
        deepseek_v4: that model's arithmetic instead of the paper's.
        reserved_sms: SMs that `hopper` leaves to long-running kernels, such as posted NCCL receives. The
            others need no reserve: their programs do not wait for ones that have not started.
        form: of the coefficients.
    """

    norm_eps: float
    iterations: int
    deepseek_v4: bool
    reserved_sms: int = 0
    form: Form = Form()


class ReadNorm(NamedTuple):
    """The RMSNorm between `pre` and F, for a `pre` that writes its output y in place of the layer input l.

    y = w l / rms(l) with rms(l) = sqrt(mean(l^2) + eps).

    Args:
        weight: [C] in the dtype of the model's parameters; w, or w - 1 with zero_centered.
        eps: added to mean(l^2) inside the root.
        zero_centered: as --apply-layernorm-1p.
    """

    weight: Tensor
    eps: float
    zero_centered: bool


class Handed(NamedTuple):
    """What a `pre` reads with in place of its own weights, and where those go (--mhc-read previous).

    Args:
        h_pre: [T, n] fp32, made by the connection in front. on: [T, n] fp32, written.
    """

    h_pre: Tensor
    on: Tensor


class HandedBack(NamedTuple):
    """The same in its backward.

    Args:
        h_pre: [T, n] fp32, as given. d_on: [T, n] fp32, what the weights handed on get; None for nothing.
        d_h_pre: [T, n] fp32, written.
    """

    h_pre: Tensor
    d_on: Tensor | None
    d_h_pre: Tensor
