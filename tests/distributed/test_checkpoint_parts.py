"""Checkpoints of 0.1, where biases and alphas were parameters by themselves, and ours are of one kind."""

import zlib

import pytest
import torch
from harness import Layout, global_parameters
from test_checkpoint import load, save, start, unwrap

from megatron_mhc.hyper_connection import HyperConnectionModule

SINGLE, SHARDED = Layout(), Layout(distributed_optimizer=True)
FP32, BF16 = torch.float32, torch.bfloat16


def as_before(monkeypatch):
    """Build connections as 0.1 did."""
    made = HyperConnectionModule.__init__

    def separate(self, config, *args):
        made(self, config, *args)
        whole = self._parameters.pop("affine")
        for name, part in self.split(whole.detach().clone()).items():
            self._parameters[name] = parameter = torch.nn.Parameter(part)
            parameter.sequence_parallel = whole.sequence_parallel
        self.parts = {}

    monkeypatch.setattr(HyperConnectionModule, "__init__", separate)


def begin(*args, before):
    with pytest.MonkeyPatch.context() as patch:
        if before:
            as_before(patch)
        return start(*args)


def step(chunks, optimizer, number):
    """With gradients that depend on names alone, too small to be clipped."""
    for name, parameter in global_parameters(chunks):
        at, _, last = name.rpartition(".")
        names = [(name, parameter.numel())]
        if last == "affine":
            names = [(f"{at}.{part}", size) for part, size in PARTS]
        noise = []
        for part, size in names:
            generator = torch.Generator().manual_seed(zlib.crc32(part.encode()) + number)
            noise.append(torch.randn(size, generator=generator) * 1e-5)
        parameter.main_grad.copy_(torch.cat(noise).view(parameter.shape))
    assert optimizer.step()[0]


PARTS = (("bias", 24), ("alpha_pre", 1), ("alpha_post", 1), ("alpha_res", 1))


def states(chunks):
    (chunk,) = chunks
    state = unwrap(chunk).state_dict()
    return {name: value.clone() for name, value in state.items() if value is not None}


def go_on(layout, dtype, folder, before, sharding="fully_reshardable"):
    """Two steps saved by one kind and a third after a load by the other: state dicts of both."""
    chunks, _, optimizer = begin(layout, "dense", dtype, before=before)
    for number in range(2):
        step(chunks, optimizer, number)
    save(folder, chunks, optimizer, sharding)
    step(chunks, optimizer, 2)
    want = states(chunks)
    chunks, _, optimizer = begin(layout, "dense", dtype, before=not before)
    load(folder, chunks, optimizer, sharding)
    step(chunks, optimizer, 2)
    return want, states(chunks)


@pytest.mark.parametrize("before", [True, False], ids=["old-to-new", "new-to-old"])
@pytest.mark.parametrize("layout, dtype", [(SINGLE, FP32), (SINGLE, BF16), (SHARDED, BF16)])
def test_training_goes_on_from_checkpoints_of_either_kind_bit_for_bit(
    run_ranks, tmp_path, layout, dtype, before
):
    for want, got in run_ranks(2, go_on, layout, dtype, tmp_path / "saved", before):
        assert list(got) == list(want)
        assert sum("_hyper_connection.alpha_" in name for name in got) == 8 * 3
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def refuse(folder, *args):
    with pytest.raises(ValueError, match="--dist-ckpt-optim-fully-reshardable .* --no-load-optim"):
        go_on(*args[:2], folder, *args[2:])


def test_a_state_by_buckets_of_the_old_kind_is_refused_with_the_remedy(run_ranks, tmp_path):
    run_ranks(2, refuse, tmp_path / "saved", SHARDED, BF16, True, "dp_reshardable")


def torch_format(layout, dtype):
    chunks, _, optimizer = begin(layout, "dense", dtype, before=True)
    step(chunks, optimizer, 0)
    (inner,) = optimizer.chained_optimizers
    sharded = layout.distributed_optimizer
    saved = inner.get_parameter_state_dp_zero() if sharded else inner.state_dict()
    chunks, _, optimizer = begin(layout, "dense", dtype, before=False)
    (inner,) = optimizer.chained_optimizers
    with pytest.raises(ValueError, match="state cannot be loaded .* --no-load-optim"):
        inner.load_parameter_state_from_dp_zero(saved) if sharded else inner.load_state_dict(saved)


@pytest.mark.parametrize("layout, dtype", [(SINGLE, FP32), (SINGLE, BF16), (SHARDED, BF16)])
def test_a_state_of_the_torch_format_is_refused_with_the_remedy(run_ranks, layout, dtype):
    run_ranks(1, torch_format, layout, dtype)


def reloaded():
    """Masters after --load-main-params-from-ckpt of a torch-format state dict, and what it has; by name."""
    chunks, _, optimizer = begin(SHARDED, "dense", BF16, before=False)
    state = {name: value + 1 for name, value in states(chunks).items()}
    optimizer.reload_model_params(state_dict={"model": dict(state)})
    (inner,) = optimizer.chained_optimizers
    got = {}
    for name, parameter in global_parameters(chunks):
        if name.endswith("affine"):
            got[name] = inner._get_main_param_and_optimizer_states(parameter)["param"]
    return got, state


def test_masters_are_made_of_the_parts_of_a_state_dict(run_ranks):
    got, state = run_ranks(1, reloaded)[0]
    assert len(got) == 8
    for name, value in got.items():
        at = name.removesuffix("affine")
        assert torch.equal(value, torch.cat([state[at + part] for part, _ in PARTS]))
