"""Stand-ins on one GPU for the other ranks of a pipeline: copies to and from pinned host memory."""

from __future__ import annotations

from typing import Any

import torch
from timeline import DEVICE, Log, Mark

from megatron_mhc.pipeline.comm import Transport


class Copies:
    """Two copy streams, one each way, and pinned host memory for every kind of message."""

    def __init__(self) -> None:
        cuda = DEVICE.type == "cuda"
        self.inward = torch.cuda.Stream(DEVICE) if cuda else None
        self.outward = torch.cuda.Stream(DEVICE) if cuda else None
        self.host: dict[Any, torch.Tensor] = {}

    def buffer(self, key: Any, like: torch.Tensor) -> torch.Tensor:
        if key not in self.host or self.host[key].numel() < like.numel():
            values = (1e-3 * torch.randn(like.shape, device=DEVICE)).to(like.dtype)  # fast where it is large
            pinned = DEVICE.type == "cuda"
            self.host[key] = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self.host[key].copy_(values)
        return self.host[key].view(-1)[: like.numel()].view(like.shape)


class LoopTransport(Transport):
    """A `Transport` whose neighbours are host memory.

    Args:
        copy: False leaves the copies out: the time of everything else.
        late: post receives from the compute stream, which they then wait for, as Megatron does.
    """

    def __init__(self, *args: Any, copies: Copies, log: Log, copy: bool, late: bool):
        super().__init__(*args)
        self.copies, self.log, self.copy, self.late = copies, log, copy, late
        self.sent: dict[Any, Mark] = {}

    def _run(
        self, stream: Any, name: str, target: torch.Tensor, source: torch.Tensor, after: Mark | None
    ) -> Mark:
        if stream is None:
            start = Mark()
            target.copy_(source)
            end = Mark()
        else:
            with torch.cuda.stream(stream):
                if after is not None:
                    after.wait()
                start = Mark()
                target.copy_(source, non_blocking=True)
                end = Mark()
            for tensor in (target, source):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        self.log.copies.append((name, start, end))
        return end

    def post(self, message: Any) -> None:
        with torch.cuda.stream(self.copies.inward):  # whose memory is free when its turn comes
            buffer = torch.empty(self.shapes[message.name], dtype=self.dtype, device=self.device)
        source = self.copies.buffer(message.name, buffer)
        if not self.copy:
            key = ("device", message.name)
            if key not in self.copies.host:
                self.copies.host[key] = source.to(self.device)
            self.coming[message] = None, self.copies.host[key].detach()  # no copy of any kind
            return
        end = self._run(self.copies.inward, message.name, buffer, source, Mark() if self.late else None)
        self.coming[message] = end, buffer

    def wait(self, message: Any) -> torch.Tensor:
        end, buffer = self.coming.pop(message)
        if end is not None:
            end.wait()
        if buffer.is_cuda:
            buffer.record_stream(torch.cuda.current_stream())
        return buffer

    def send(self, message: Any, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().contiguous()
        assert tuple(tensor.shape) == self.shapes[message.name] and tensor.dtype == self.dtype
        if self.copy:
            target = self.copies.buffer(("sent", message.name), tensor)
            self.sent[message] = self._run(self.copies.outward, message.name, target, tensor, Mark())

    def wait_sent(self, message: Any) -> None:
        if message in self.sent:
            self.sent[message].wait()

    def sweep(self) -> None:
        pass

    drain = sweep


class Exchange(torch.autograd.Function):
    """Stands for an all-to-all: a share of the tokens goes to the host and back, forward and backward."""

    copies: Copies
    active, share = True, 1.0

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
        return Exchange.move(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return Exchange.move(gradient)

    @staticmethod
    def move(tokens: torch.Tensor) -> torch.Tensor:
        out = tokens.detach().clone()
        if Exchange.active:
            moved = out[: int(Exchange.share * len(out))]
            host = Exchange.copies.buffer(("exchange", tokens.shape[-1:]), moved)
            host.copy_(moved, non_blocking=True)
            moved.copy_(host, non_blocking=True)
        return out
