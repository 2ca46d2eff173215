"""What recompute is tried on: mappings that depend on the token, and a loss."""

import gpt

from megatron_mhc import MHCConfig

LIVELY = dict(init="uniform", init_gating_factor=0.5)  # mappings that depend on the token


def replaying(**options):
    return MHCConfig(**(LIVELY | dict(recompute_layer_num="3") | options))


def losses(model, seed):
    inputs, labels = gpt.batch(seed)
    return model(*inputs, labels=labels).mean()
