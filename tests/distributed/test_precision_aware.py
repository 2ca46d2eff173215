"""--use-precision-aware-optimizer: a stand-in for Transformer Engine's Adam keeps masters and moments."""

import functools
import sys
import types

import pytest
import torch
from harness import Layout
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from test_checkpoint import cpu, train

from megatron_mhc import register
from megatron_mhc.testing.adam import PlainAdam


class FusedAdam(PlainAdam):
    """Steps bf16 parameters by their masters, and fp32 ones as they are; moments of any dtype.

    Like Transformer Engine's, it makes a master of each parameter, and updates those of bf16 ones alone.
    """

    def __init__(
        self,
        params,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        master_weights=False,
        use_decoupled_grad=False,
        master_weight_dtype=torch.float32,
        **options,
    ):
        assert master_weights and use_decoupled_grad
        self.dtypes = dict(exp_avg=exp_avg_dtype, exp_avg_sq=exp_avg_sq_dtype, master_param=torch.float32)
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            for parameter in group["params"]:
                self._step(group, parameter)

    def _step(self, group, parameter):
        state = self.state[parameter]
        if not state:
            for name, dtype in self.dtypes.items():
                state[name] = torch.zeros_like(parameter, dtype=dtype)
            state["master_param"].copy_(parameter)
        half = parameter.dtype != torch.float32
        target = state["master_param"] if half else parameter.detach()
        target.grad = parameter.decoupled_grad.float()
        self.state[target] = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        self._update(group, target)
        moments = self.state.pop(target)
        target.grad = None
        for name, value in moments.items():
            state[name].copy_(value)
        if half:
            parameter.copy_(target)

    def get_unscaled_state(self, parameter, name):
        return self.state[parameter][name].float()

    def set_scaled_state(self, parameter, name, value):
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=self.dtypes[name])
        state[name].copy_(value)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for number, values in state["state"].items():
            parameter = [p for group in self.param_groups for p in group["params"]][number]
            self.state[parameter] = {name: v.to(self.dtypes[name]) for name, v in values.items()}


DISTRIBUTED = Layout(distributed_optimizer=True)
LAYOUTS = {"dp2": DISTRIBUTED, "pp2": Layout(pp=2, distributed_optimizer=True)}
BF16 = dict(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)


def aware(layout, steps, *folders, **options):
    """As `test_checkpoint.train` in bf16, with the flag."""
    register()
    engine = types.ModuleType("transformer_engine.pytorch.optimizers")
    engine.FusedAdam = FusedAdam
    sys.modules["transformer_engine.pytorch.optimizers"] = engine  # Megatron asks its arguments
    use_plain = cpu.use_plain_adam

    def use_fused():
        use_plain()
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam

    cpu.use_plain_adam = use_fused
    options |= dict(use_precision_aware_optimizer=True, store_param_remainders=False)
    return train(layout, "dense", torch.bfloat16, steps, *folders, **options)


def plain(layout, steps, *folders):
    register()
    return train(layout, "dense", torch.bfloat16, steps, *folders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_in_the_optimizer_step_as_megatrons_own_bit_for_bit(run_ranks, layout):
    wanted = run_ranks(2, plain, LAYOUTS[layout], range(3))[0]
    assert run_ranks(2, aware, LAYOUTS[layout], range(3))[0] == wanted


@pytest.mark.parametrize("moments", [{}, BF16], ids=["float32", "bf16"])
def test_training_resumed_matches_unbroken_run_bit_for_bit(run_ranks, tmp_path, moments):
    run, folder = functools.partial(run_ranks, 2, functools.partial(aware, **moments)), tmp_path / "saved"
    history = run(DISTRIBUTED, range(2), None, folder)[0] + run(DISTRIBUTED, range(2, 4), folder)[0]
    assert history == run(DISTRIBUTED, range(4))[0]


def test_its_checkpoint_goes_on_without_the_flag(run_ranks, tmp_path):
    """Whose masters of fp32 parameters are the parameters themselves."""
    history = run_ranks(2, aware, DISTRIBUTED, range(2), None, tmp_path / "saved")[0]
    history += run_ranks(2, plain, DISTRIBUTED, range(2, 4), tmp_path / "saved")[0]
    assert history == run_ranks(2, plain, DISTRIBUTED, range(4))[0]
