"""`--mhc-read previous`: who reads with whose weights, and how they travel."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.handed_on import alone_width, first_weights, hand_on, taken
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import packed, reference
from megatron_mhc.sublayer import SubLayer

S, B, N, C = 3, 2, 4, 6
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def config(dtype=torch.float64):
    return TransformerConfig(
        num_layers=1, hidden_size=C, num_attention_heads=1, use_cpu_initialization=True, params_dtype=dtype
    )


def connections(mhc, count):
    torch.manual_seed(1)
    made = [HyperConnectionModule(config(), mhc, i) for i in range(count)]
    for parameter in (p for one in made for p in one.parameters()):
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_a_sublayer_reads_with_the_weights_of_the_streams_in_front(preset):
    """Written out: l_k = h_pre(x_{k-1}) x_k, but x_{k+1} = H_res(x_k) x_k + h_post(x_k) f_k."""
    mhc = MHCConfig(preset=preset, read="previous")
    modules, x = connections(mhc, 3), rand(S * B, N, C).requires_grad_()
    streams = x.view(S, B, N * C)
    h_pre, wanted = first_weights(streams, N), x
    weights = torch.zeros(S * B, N, dtype=torch.float64)
    weights[:, 0] = 1.0
    for module in modules:
        visit = SubLayer(module, None, None, 0).pre(streams, h_pre)
        f = torch.tanh(visit.layer_input)
        streams, h_pre = module.post_res(streams, f, visit.mappings), visit.handed_on
        read = sum(weights[:, i, None] * wanted[:, i] for i in range(N))
        torch.testing.assert_close(visit.layer_input.view(S * B, C), read)
        own = module.coefficients(wanted)
        mixed = [
            sum(own.h_res[:, i, j, None] * wanted[:, j] for j in range(N))
            + own.h_post[:, i, None] * torch.tanh(read)
            for i in range(N)
        ]
        wanted, weights = torch.stack(mixed, dim=1), own.h_pre
        torch.testing.assert_close(streams.view(S * B, N, C), wanted)
    g = rand(S * B, C)
    found = torch.autograd.grad((reference.pre(streams.view(S * B, N, C), h_pre) * g).sum(), x)
    exact = torch.autograd.grad((torch.einsum("tn,tnc->tc", weights, wanted) * g).sum(), x)
    torch.testing.assert_close(found, exact)


def test_home_streams_are_those_of_who_reads():
    mhc = MHCConfig(read="previous", init_gating_factor=0.0)
    for index in range(5):
        module = HyperConnectionModule(config(), mhc, index)
        own = module.coefficients(rand(1, N, C))
        assert own.h_pre.argmax().item() == (index + 1) % N


@pytest.mark.parametrize("sequence", [S, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_and_their_gradients_keep_every_bit(dtype, sequence):
    """The gradients as well: halves of fp32 numbers lie in the places of 16-bit ones."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = rand(sequence, B, N * C, dtype=dtype).requires_grad_()
    h = rand(sequence * B, N, dtype=exact).requires_grad_()
    together = packed.join(x * 1, h * 1)
    mhc = MHCConfig(read="previous")
    assert together.shape[-1] == alone_width(config(dtype), mhc)
    streams, h_pre = taken(together, config(dtype), mhc, "here")
    assert torch.equal(streams, x) and torch.equal(h_pre, h) and streams.is_contiguous()
    dx, dh = (rand(*t.shape, dtype=t.dtype) for t in (x, h))
    torch.autograd.backward([streams, h_pre], [dx, dh])
    assert torch.equal(x.grad, dx) and torch.equal(h.grad, dh)


@pytest.mark.parametrize("tokens", [(1, 1), (3, 2), (0, 2)])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_what_is_packed_are_copies_of_any_number_of_tokens(dtype, n, tokens):
    """Of one token too, whose row is contiguous where it lies, behind an odd number of channels."""
    s, b = tokens
    channels, exact = 5, torch.float64 if dtype == torch.float64 else torch.float32
    x = rand(s, b, channels, dtype=dtype).requires_grad_()
    h = rand(s * b, 2 * n, dtype=exact).requires_grad_()
    for coefficients in (h, h[:, n:], h[:, :1]):
        together = packed.join(x * 1, coefficients)
        places = [packed.part(together, channels), packed.unpack(together.detach(), channels)[1:]]
        found = [part for parts in places for part in parts]
        base = together.untyped_storage().data_ptr()
        assert all(part.untyped_storage().data_ptr() != base for part in found if part.numel())
        assert torch.equal(found[0], x) and all(torch.equal(part, coefficients) for part in found[1:])
        gradients = torch.autograd.grad(found[:2], [x, coefficients], [torch.ones_like(p) for p in found[:2]])
        assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)


def test_weights_travel_on_the_tensor_or_packed():
    mhc = MHCConfig(read="previous")
    streams, h_pre = rand(S, B, N * C), rand(S * B, N)
    carrying = hand_on(streams.clone(), h_pre, alone=False)
    assert taken(carrying, config(), mhc, "here")[1] is h_pre
    alone = hand_on(streams.clone(), h_pre, alone=True)
    assert alone.shape[-1] == N * C + N
    assert all(map(torch.equal, taken(alone, config(), mhc, "here"), (streams, h_pre)))


def test_streams_that_lost_their_weights_are_refused():
    with pytest.raises(
        ValueError, match="layer 3: the streams came without the weights that --mhc-read prev"
    ):
        taken(rand(S, B, N * C), config(), MHCConfig(read="previous"), "layer 3")
