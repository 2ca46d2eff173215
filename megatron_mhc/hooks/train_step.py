"""Steps of Megatron's own training loop that are sampled, written and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.carried import options_of
from megatron_mhc.diagnostics.sampler import Sampler
from megatron_mhc.diagnostics.training import sound, write


def sample_steps(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `megatron.training.training.train_step` so that every `--mhc-log-interval`-th step is sampled.

    The first micro-batch of the step is what is sampled. Other steps run as they are: the model has
    forward hooks during sampled steps only.
    """
    raised: set[str] = set()

    def train_and_sample(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int | None = None,
        **groups: Any,
    ) -> Any:
        def step() -> Any:
            return train_step(
                forward_step_func,
                data_iterator,
                model,
                optimizer,
                opt_param_scheduler,
                config,
                forward_backward_func,
                iteration=iteration,
                **groups,
            )

        mhc = options_of(model, config)
        # Megatron counts the step that begins here from 0, and logs it from 1.
        if mhc is None or not mhc.log_interval or iteration is None or (iteration + 1) % mhc.log_interval:
            return step()
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        with Sampler(model, config) as sampler:
            result = step()
        report = sampler.report()
        write(report, iteration + 1, get_tensorboard_writer(), get_wandb_writer())
        if sound(report, mhc, raised, iteration + 1):
            # should_exit and exit_code: the loop ends as it does on a signal, on all ranks alike.
            return (*result[:3], True, 1, *result[5:])
        return result

    return train_and_sample
