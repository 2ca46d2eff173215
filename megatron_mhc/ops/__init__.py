"""The mHC operations; `reference` is their definition and, for now, their only implementation."""

from megatron_mhc.ops.reference import Coefficients, contract, expand, learned_head, post_res, pre, sinkhorn

__all__ = ["Coefficients", "contract", "expand", "learned_head", "post_res", "pre", "sinkhorn"]
