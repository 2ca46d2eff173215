"""The plugin's residual connections between the sub-layers of a public model class."""

import copy

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.streams import ContractHead

# fp32 against fp32, four layers deep: the two sum in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


class PluginModel(torch.nn.Module):
    """The plugin's connections and head, numbered by the plugin's names."""

    def __init__(self, theirs, mhc):
        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=theirs.hidden_size,
            num_attention_heads=1,
            use_cpu_initialization=True,
        )
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        for i in range(theirs.num_hidden_layers):
            layer = torch.nn.Module()
            layer.self_attention_hyper_connection = HyperConnectionModule(config, mhc, 2 * i)
            layer.mlp_hyper_connection = HyperConnectionModule(config, mhc, 2 * i + 1)
            self.decoder.layers.append(layer)
        self.decoder.final_layernorm = torch.nn.Module()
        if mhc.contract == "learned_head":
            self.decoder.final_layernorm.head = ContractHead(config, mhc)

    def mappings(self):
        return {name: value.clone() for name, value in self.state_dict().items()}

    def gradients(self):
        """By the names of a checkpoint."""
        twin = copy.deepcopy(self)
        for own, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.data.copy_(own.grad)
        return twin.mappings()


def around(connection, streams, sublayer):
    """One sub-layer F of [b, s, C] between the plugin's streams [s, b, n*C]."""
    hidden, mappings = connection(streams)
    f = sublayer(hidden.transpose(0, 1).contiguous())
    return connection.post_res(streams, f.transpose(0, 1), mappings)


def run_theirs(decoder, tokens):
    """Their streams behind each layer, last hidden state, and the arguments that each layer got."""
    streams, arguments, hooks = [], [], []

    def before(module, args, kwargs):
        arguments.append(dict(kwargs))

    for layer in decoder.layers:
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda module, args, out: streams.append(out)))
    hidden = decoder(tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return streams, hidden, arguments
