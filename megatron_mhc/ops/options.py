"""What the kernels of `pre` take besides tensors."""

from typing import NamedTuple


class Options(NamedTuple):
    """Settings of one connection's kernels.

    Args:
        norm_eps: added to mean(x^2) inside the root of the norm.
        iterations: of Sinkhorn-Knopp.
        deepseek_v4: that model's arithmetic instead of the paper's.
        reserved_sms: SMs that `hopper` leaves to long-running kernels, such as posted NCCL receives. The
            others need no reserve: their programs do not wait for ones that have not started.
    """

    norm_eps: float
    iterations: int
    deepseek_v4: bool
    reserved_sms: int = 0
