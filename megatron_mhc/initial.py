"""The mappings of a connection and of a learned head at step 0, as `--mhc-init` says."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_mhc.config import MHCConfig

HOME_READ_LOGIT = 3.0  # sigmoid(3) = 0.953 of the home stream, sigmoid(-3) = 0.047 of the others
HOME_MIX_LOGIT = 6.0  # 6 I - 3: diagonal 0.993 after Sinkhorn, far from saturated


def mean_read_logit(n: int) -> float:
    """The logit whose sigmoid is 1/n, by which HY-V4 starts to read n streams; 0 for a single one."""
    return -math.log(max(n - 1, 1))


def biases(mhc: MHCConfig, sublayer_index: int) -> Tensor:
    """Biases of the learned mappings: pre [n], post [n], res [n*n], on torch's default device; not empty.

    Args:
        sublayer_index: 0-based in the whole model; the home stream is its remainder by n.
    """
    n, init = mhc.num_residual_streams, mhc.init
    home = torch.zeros(n)
    home[sublayer_index % n] = 1.0
    eye, equal = torch.eye(n).flatten(), torch.full((n,), 1 / n)
    if mhc.is_hc:
        parts = {"pre": home if init == "home_stream" else equal, "post": torch.ones(n), "res": eye}
    elif init == "uniform":
        parts = {"pre": torch.zeros(n), "post": torch.zeros(n), "res": torch.zeros(n * n)}
    else:
        read = (
            torch.full((n,), mean_read_logit(n)) if init == "mean_read" else HOME_READ_LOGIT * (2 * home - 1)
        )
        parts = {"pre": read, "post": torch.zeros(n), "res": HOME_MIX_LOGIT * eye - HOME_MIX_LOGIT / 2}
    return torch.cat([parts[part] for part in mhc.parts])


def draw_phi(weight: Tensor, mhc: MHCConfig, std: float) -> None:
    """Draw phi where `--mhc-init` has it random, in place; std: --init-method-std."""
    if mhc.init == "uniform":
        nn.init.xavier_uniform_(weight)
    elif mhc.init == "mean_read":
        nn.init.normal_(weight, std=std)
