"""Diagnostics as a callback of Megatron-Bridge's training loop."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron.core.utils import get_model_config

from megatron_mhc import hooks
from megatron_mhc.config import MHCConfig
from megatron_mhc.diagnostics.sampler import Sampler
from megatron_mhc.diagnostics.training import sound, write
from megatron_mhc.hooks.uses import BRIDGE_TRAINING_USES


def is_diagnostic(option: str) -> bool:
    """Whether an option is one of the callback's."""
    return option.startswith(("log_", "alarm"))


class MHCDiagnostics:
    """Samples every `log_interval`-th step, writes its report and watches it, as --mhc-log-interval does.

    To be given to Bridge: `pretrain(config, forward_step, callbacks=[MHCDiagnostics(log_interval=100)])`.
    It writes to the TensorBoard and W&B that Bridge writes to.

    Args:
        options: `log_interval`, `log_tokens`, `alarm`, `alarm_gain`, `alarm_logit`.

    Raises:
        ValueError: another option, or no `log_interval`; when training starts, a model without mHC, or
            nowhere to write.
    """

    def __init__(self, **options: Any):
        if others := [name for name in options if not is_diagnostic(name)]:
            known = ", ".join(option.name for option in fields(MHCConfig) if is_diagnostic(option.name))
            raise ValueError(f"MHCDiagnostics: {others[0]} is not one of {known}; give it to use_mhc")
        self.options = MHCConfig.from_mapping(options, "MHCDiagnostics")
        if not self.options.log_interval:
            raise ValueError("MHCDiagnostics: log_interval 0 samples no step: give log_interval=100")
        self.raised: set[str] = set()
        self.sampler: Sampler | None = None

    def on_train_start(self, context: Any) -> None:
        """Refuse to sample what has no mHC, or where nobody writes the result."""
        hooks.check_uses(BRIDGE_TRAINING_USES)
        self._of(context.model)
        logger = context.state.cfg.logger
        if self.options.alarm == "off" and not (logger.tensorboard_dir or logger.wandb_project):
            raise ValueError(
                f"MHCDiagnostics: log_interval {self.options.log_interval} has nowhere to write: set "
                "logger.tensorboard_dir or logger.wandb_project, or give alarm='warn'"
            )

    def on_train_step_start(self, context: Any) -> None:
        """Look at the first micro-batch of the step, if it is one to sample."""
        # Bridge counts the step that begins here from 0, and logs it from 1.
        if (context.state.train_state.step + 1) % self.options.log_interval == 0:
            self.sampler = self._of(context.model).__enter__()

    def on_train_step_end(self, context: Any) -> None:
        """Write the report.

        Raises:
            RuntimeError: `alarm` is stop, and a gain or logit is out of range; on all ranks alike.
        """
        if self.sampler is None:
            return
        sampler, self.sampler = self.sampler, None
        sampler.__exit__()
        report, step = sampler.report(), context.state.train_state.step + 1
        write(report, step, context.state.tensorboard_logger, context.state.wandb_logger)
        if remedy := sound(report, self.options, self.raised, step):
            raise RuntimeError(f"mHC alarm at step {step}: {remedy}")

    def _of(self, model: Any) -> Sampler:
        return Sampler(model, get_model_config(model[0]), self.options.log_tokens)
