"""Weight gradients that linears postpone (--delay-wgrad-compute), and who computes them.

Under that flag the backward of a Transformer Engine linear computes only the gradient of its input and
queues the rest. `backward_dw` then computes the gradients of weight and bias and runs the hooks with which a
data-parallel wrapper adds them to `main_grad` and, after the last micro-batch, reduces them. Nothing else
does: a queue that nobody empties is a missing gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_mhc.pipeline.streams import HostStreams


def is_delayed(module: Any) -> bool:
    """Whether a module queues its weight gradients."""
    store = getattr(module, "wgrad_store", None)
    return store is not None and store.delay_wgrad_compute()


class DelayedWeights:
    """The linears of a model chunk, wherever they are in it, that queue their weight gradients.

    Args:
        chunk: as Megatron's training wraps it.

    Raises:
        ValueError: no linear delays anything, or the data-parallel wrapper does not know that some do.
    """

    def __init__(self, chunk: nn.Module, streams: HostStreams):
        self._streams = streams
        self._linears = [(name, module) for name, module in chunk.named_modules() if is_delayed(module)]
        if not self._linears:
            raise ValueError(
                "--delay-wgrad-compute True: no linear of a model chunk delays its weight gradients: use "
                "Transformer Engine's layers, built under that setting, or drop it"
            )
        for name, linear in self._linears:
            # Without its hooks `backward_dw` leaves a gradient where the next micro-batch's replaces it.
            late = [p for p in linear.parameters() if getattr(p, "skip_backward_post_hook", False)]
            if any(p.requires_grad for p in late) and not linear.wgrad_accumulation_and_reduce_hooks:
                raise ValueError(
                    "--delay-wgrad-compute True: the wrapper of a model chunk would lose gradients of "
                    f"{name}: give its DistributedDataParallelConfig delay_wgrad_compute=True, as Megatron's "
                    "training does"
                )

    def compute(self) -> None:
        """Compute everything queued, on the current stream, which runs after the backward that queued it."""
        for _, linear in reversed(self._linears):
            while _queued(linear):
                self._used(linear)
                linear.backward_dw()

    def _used(self, linear: nn.Module) -> None:
        # A bias that post_res adds has its gradient already, in another stream's memory.
        for parameter in linear.parameters():
            if parameter.grad is not None:
                self._streams.used(parameter.grad)

    def check_computed(self) -> None:
        """Raise if something is still queued.

        Raises:
            RuntimeError: naming the linears.
        """
        if left := [name for name, linear in self._linears if _queued(linear)]:
            raise RuntimeError(
                f"--delay-wgrad-compute: a step ended without the weight gradients of {', '.join(left)}"
            )


def _queued(linear: Any) -> bool:
    return not linear.wgrad_store.context.empty()
