"""Which way round conventions hold H_res, and the head that weighs all streams alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig

EPS = 1e-6  # of DeepSeek-V4's head, whose weights are sigmoid(.) + eps


def transpose_res(tensor: Tensor, n: int, dim: int) -> Tensor:
    """Swap the two indices of the n*n block behind the 2n rows of pre and post in dimension `dim`."""
    dim %= tensor.dim()
    read_write, res = tensor.split([2 * n, n * n], dim)
    res = res.unflatten(dim, (n, n)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return torch.cat([read_write, res], dim)


def is_comb(convention: str, mhc: MHCConfig) -> bool:
    """Whether the last block's logits are those of comb = H_res^T."""
    if convention == "plugin":
        return mhc.has_deepseek_form
    return convention != "megatron-main"


def turn(part: str, value: Tensor, n: int) -> Tensor:
    """Transpose H_res in a mapping parameter of a connection."""
    if part.startswith("alpha"):
        return value
    return transpose_res(value, n, -2 if part == "mapping_proj.weight" else -1)


def equal_head(n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale of the head that weighs n streams by 1/n; the final norm ignores the scale."""
    weight = 1 / n - EPS
    base = torch.full((n,), math.log(weight / (1 - weight)))
    return torch.zeros(n, n * width), base, torch.ones(1)
