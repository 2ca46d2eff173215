"""What a model and its config hold between calls."""

from megatron_mhc.chunk import chunk_of
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.layer import HyperConnectionTransformerLayer

OF_MEGATRON = {"mlp_norm_manager", "current_microbatch"}  # which its own code sets


def state(chunks, config):
    """By name, the identity of all that layers, connections, their sub-layers and the config hold."""
    held = dict(config=vars(config))
    for at, model in enumerate(chunks):
        for name, module in model.named_modules():
            if isinstance(module, (HyperConnectionModule, HyperConnectionTransformerLayer)):
                held[f"{at} {name}"] = vars(module)
        for sublayer in chunk_of(model).sublayers:
            held[f"{at} sub-layer {sublayer.position}"] = vars(sublayer)
    return {
        f"{owner}.{key}": id(value)
        for owner, attributes in held.items()
        for key, value in attributes.items()
        if key not in OF_MEGATRON
    }
