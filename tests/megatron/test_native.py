"""The kernels under Megatron's own mHC, which released Megatron lacks: here under a stand-in for its module.

With MHC_MEGATRON_DEV=/path/to/Megatron-LM, a checkout of its branch dev, also in models of that Megatron.
"""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_mhc import native
from megatron_mhc.ops import reference

WHERE = "megatron.core.transformer.hyper_connection"
EPS = 1e-6
CONFIG = dict(hidden_dropout=0.0, overlap_moe_expert_parallel_comm=False, cuda_graph_impl="none")
Four = tuple[Tensor, Tensor, Tensor, Tensor]


class HyperConnectionModule(nn.Module):
    """Megatron's interface and parameters, and its arithmetic by the definitions of `reference`."""

    def __init__(self, n=4, channels=32, **settings):
        super().__init__()
        self.config = SimpleNamespace(**{**CONFIG, **settings})
        self.n, self.hidden_size, self.sinkhorn_iterations = n, channels, 5
        self.norm_eps = self.sinkhorn_eps = self.compute_h_eps = EPS
        rows = n * n + 2 * n
        self.mapping_proj = nn.Linear(n * channels, rows, bias=False)
        self.alpha_pre, self.alpha_post, self.alpha_res = (
            nn.Parameter(torch.tensor([0.7])) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, hidden_states: Tensor, mhc_recompute_manager=None, output_slot=None) -> Four:
        s, b, _ = hidden_states.shape
        x = hidden_states.view(s * b, self.n, -1)
        rms = x.flatten(1).norm(dim=-1, keepdim=True) / (self.n * self.hidden_size) ** 0.5
        sizes = self.n, self.n, self.n**2
        alphas = (self.alpha_pre, self.alpha_post, self.alpha_res)
        gates = torch.cat([alpha.expand(size) for alpha, size in zip(alphas, sizes, strict=True)])
        logits = self.mapping_proj(x.flatten(1)) / (rms + EPS) * gates + self.bias
        h = reference.mhc_mappings(
            logits, self.n, deepseek_v4=True, sinkhorn_iterations=self.sinkhorn_iterations
        )
        read = reference.pre(x, h.h_pre).view(s, b, -1)
        return read, h.h_res.view(s, b, self.n, -1), h.h_post.view(s, b, -1), hidden_states

    def fused_h_res_h_post_bda(
        self, h_res, original_residual, h_post, layer_output_with_bias, dropout_prob, training, fused,
        manager=None,
    ):  # fmt: skip
        f, bias = layer_output_with_bias
        f = f if bias is None else f + bias
        x = original_residual.view(-1, self.n, f.shape[-1])
        out = reference.post_res(x, f.flatten(0, 1), h_post.flatten(0, 1), h_res.flatten(0, 1))
        return out.view_as(original_residual)


class Manager:
    """Megatron's of a block that is recomputed."""

    def __init__(self):
        self.checkpoints = []

    def add_checkpoint(self, checkpoint):
        assert checkpoint.outputs is not None
        self.checkpoints.append(checkpoint)

    def drop(self, hook_tensor):
        for checkpoint in self.checkpoints:
            for output in checkpoint.outputs:
                output.untyped_storage().resize_(0)
        hook_tensor.register_hook(lambda _: [c._recompute(None) for c in self.checkpoints] and None)


@pytest.fixture
def megatron(monkeypatch):
    module = ModuleType(WHERE)
    module.HyperConnectionModule = HyperConnectionModule
    monkeypatch.setitem(sys.modules, WHERE, module)
    return module


def model(n=4, channels=32, **settings):
    torch.manual_seed(0)
    return nn.ModuleList(HyperConnectionModule(n, channels, **settings) for _ in range(3))


def run(connections, dtype=torch.float32, with_bias=True, with_zeros=False, manager=None):
    """The streams behind three connections and every gradient; with a token of zeros, of that alone."""
    n, channels = connections[0].n, connections[0].hidden_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, n * channels, generator=generator, dtype=dtype)
    x = torch.zeros_like(x)[:1, :1] if with_zeros else x
    w, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((channels,) * 2, channels))
    leaves = [x.requires_grad_(), (w / 6).requires_grad_(), bias.requires_grad_()]
    streams = x
    for i, connection in enumerate(connections):
        last = i == len(connections) - 1
        read, h_res, h_post, residual = connection(streams, manager)
        output = torch.tanh(read @ leaves[1]), leaves[2] if with_bias else None
        streams = connection.fused_h_res_h_post_bda(
            h_res, residual, h_post, output, 0.0, True, False, None if last else manager
        )
    if manager is not None:
        manager.drop(streams)
    of_streams = torch.randn(streams.shape, generator=generator, dtype=dtype)
    out = streams.detach().clone()
    streams.backward(of_streams)
    gradients = [leaf.grad for leaf in leaves[: 3 if with_bias else 2]]
    return [out, *gradients, *(p.grad for p in connections.parameters())]


@pytest.mark.parametrize("n, channels", [(4, 32), (2, 48), (1, 16)])
@pytest.mark.parametrize("how", [dict(), dict(with_bias=False), dict(with_zeros=True)], ids=str)
def test_accelerated_connections_equal_megatrons(megatron, n, channels, how):
    """Output and every gradient, fp32."""
    expected = run(model(n, channels), **how)
    found = run(native.accelerate(model(n, channels), "triton"), **how)
    # With one stream, h_res is 1 and its logits have no gradient but rounding.
    scale = max(t.abs().max() for t in expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 5e-6 * max(other.abs().max(), 1e-2 * scale)


def test_recomputed_connections_have_the_bits_of_kept_ones(megatron):
    kept = run(native.accelerate(model(), "triton"))
    manager = Manager()
    recomputed = run(native.accelerate(model(), "triton"), manager=manager)
    assert len(manager.checkpoints) == 5  # of three layer inputs, and two streams between
    assert all(c.outputs == () for c in manager.checkpoints)
    for one, other in zip(recomputed, kept, strict=True):
        assert torch.equal(one, other)


def test_parameters_and_checkpoints_stay(megatron):
    plain, ours = model(), native.accelerate(model(), "triton")
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert isinstance(ours[0], HyperConnectionModule)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for one, other in zip(run(again), run(ours), strict=True):
            assert torch.equal(one, other)
        ours.zero_grad()


def test_a_second_call_sets_the_backend(megatron):
    expected = run(native.accelerate(model(), "triton"))
    twice = native.accelerate(native.accelerate(model(), "hopper"), "triton")
    for one, other in zip(run(twice), expected, strict=True):
        assert torch.equal(one, other)


def test_a_pipeline_stage_without_layers_stays(megatron):
    stage = nn.Linear(2, 2)
    stage.config = SimpleNamespace(enable_hyper_connections=True)
    assert native.accelerate(stage) is stage


def test_released_megatron_has_nothing_to_accelerate():
    with pytest.raises(ValueError, match=r"no megatron.core.transformer.hyper_connection.*--spec"):
        native.accelerate(nn.ModuleList())


def test_another_interface_is_refused(megatron, monkeypatch):
    def forward(self, hidden_states, mhc_recompute_manager=None) -> Four: ...

    with monkeypatch.context() as patch:
        patch.setattr(HyperConnectionModule, "forward", forward)
        with pytest.raises(ValueError, match="forward takes self, hidden_states, mhc_recompute_manager, not"):
            native.accelerate(model())

    def of_three(
        self, hidden_states, mhc_recompute_manager=None, output_slot=None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    monkeypatch.setattr(HyperConnectionModule, "forward", of_three)
    with pytest.raises(ValueError, match="forward returns .*, not 4 tensors"):
        native.accelerate(model())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hidden_dropout=0.1), "--hidden-dropout 0.1: .*set it to 0"),
        (dict(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm"),
        (dict(cuda_graph_impl="local"), "--cuda-graph-impl local: .*set none"),
    ],
)
def test_setting_without_kernels_is_refused(megatron, settings, message):
    with pytest.raises(ValueError, match=message):
        native.accelerate(model(**settings))


def test_what_cannot_serve_is_named(megatron):
    with pytest.raises(ValueError, match="backend='fast'"):
        native.accelerate(model(), "fast")
    with pytest.raises(ValueError, match="--enable-hyper-connections"):
        native.accelerate(nn.Linear(2, 2))
    other = model()
    other[1].sinkhorn_eps = 1e-5
    with pytest.raises(ValueError, match="eps is not 1e-06"):
        native.accelerate(other)
    with pytest.raises(ValueError, match="torch.float64"):
        run(native.accelerate(model().double()), torch.float64)
    with pytest.raises(RuntimeError, match="not what this connection's forward returned"):
        connection = native.accelerate(model(), "triton")[0]
        read, h_res, h_post, residual = connection(torch.randn(2, 1, 128))
        connection.fused_h_res_h_post_bda(h_res.clone(), residual, h_post, (read, None), 0.0, True, False)


@pytest.mark.skipif("MHC_MEGATRON_DEV" not in os.environ, reason="needs a checkout: MHC_MEGATRON_DEV")
@pytest.mark.parametrize("kind", ["gpt", "hybrid"])
def test_model_of_megatrons_trains_as_by_its_own_operations(kind):
    here = Path(__file__).parent
    path = os.pathsep.join([os.environ["MHC_MEGATRON_DEV"], str(here.parents[1])])
    program = [sys.executable, str(here / "native_models.py"), kind]
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
