"""Pipeline messages that are n streams wide, of training and of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mhc.carried import options_of
from megatron_mhc.handed_on import alone_width
from megatron_mhc.hyper_connection import stream_widths


def widen_messages(communicate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `P2PCommunicator._communicate` so that mHC models exchange [s, b, n*C] instead of [s, b, C].

    Shapes are asserted on the sending side before and on the receiving side after: point-to-point
    transfers check nothing, and a size mismatch would truncate silently or hang.
    """

    def communicate_streams(
        self: Any,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        mhc = getattr(self.config, "mhc", None)
        if mhc is not None:
            if mhc.pipeline_schedule != "megatron":
                raise ValueError(
                    f"--mhc-pipeline-schedule {mhc.pipeline_schedule}, but the training loop runs Megatron's "
                    "schedule: let it call megatron_mhc.pipeline.forward_backward instead of what "
                    "get_forward_backward_func returns, or use --mhc-pipeline-schedule megatron"
                )
            width = alone_width(self.config, mhc)
            tensor_shape = (*tensor_shape[:-1], width) if tensor_shape else tensor_shape
            # Neighbours that tell each other their shapes receive what is sent, whatever is asked for.
            standalone = getattr(self.config, "mtp_standalone", False)
            shape = None if self.config.variable_seq_lengths or standalone else tensor_shape
            # Behind a stage of MTP alone there are no streams.
            widths = (width, self.config.hidden_size) if standalone else (width,)
            for sent in (tensor_send_next, tensor_send_prev):
                _check(sent, shape, widths, "sent")
        else:
            for sent in (tensor_send_next, tensor_send_prev):
                _check_plain(sent, self.config)
        received = communicate(
            self,
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
        if mhc is not None:
            for got in received[:2]:
                _check(got, shape, widths, "received")
        return received

    return communicate_streams


def widen_receive_buffer(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `AbstractModelInferenceWrapper._allocate_recv_buffer`: [s, b, n*C] for a model with n streams.

    Inference on a pipeline sends past the communicator of training.
    """

    def allocate_streams(self: Any, batch_size: int, seq_len: int) -> Tensor:
        buffer = allocate(self, batch_size, seq_len)
        mhc = options_of(self.model, self.config)
        if mhc is None:
            return buffer
        *tokens, _ = buffer.shape
        if getattr(self.config, "mtp_standalone", False) and not _has_decoder(self.model):
            return buffer  # of the stage behind MTP's, which contracts
        return buffer.new_empty(*tokens, alone_width(self.config, mhc))

    return allocate_streams


def _has_decoder(model: Any) -> bool:
    """Whether a stage has layers of the decoder, or its end."""
    names = [name for name, _ in model.named_modules()]
    return any("decoder.layers." in name or "decoder.final_layernorm" in name for name in names)


def _check_plain(tensor: Tensor | None, config: Any) -> None:
    """Refuse streams in a pipeline whose config knows of none: its neighbour's receive would be too small."""
    hidden = getattr(config, "hidden_size", None)
    if tensor is not None and tensor.shape[-1] != hidden and tensor.shape[-1] in stream_widths():
        raise ValueError(
            f"pipeline message with shape {tuple(tensor.shape)} of an mHC model, under a copy of its config "
            "that lost the mHC options: give DistributedDataParallel and the schedule the model's own config"
        )


def _check(tensor: Tensor | None, shape: Any, widths: tuple[int, ...], what: str) -> None:
    if tensor is None:
        return
    wrong = tuple(tensor.shape) != tuple(shape) if shape else tensor.shape[-1] not in widths
    if wrong:
        expected = tuple(shape) if shape else ("...", *widths[:1])
        raise ValueError(
            f"pipeline message {what} with shape {tuple(tensor.shape)}, expected {expected}: every stage "
            "needs the same sequence length, micro-batch size and --mhc-num-residual-streams"
        )
