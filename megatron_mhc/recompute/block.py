"""One block of sub-layers in one forward pass: what it drops, and the replay that brings it back.

Two kinds of references keep a dropped tensor alive, and each is let go in its own way:

    mHC's operations   save the streams x. Hooks on what they save put a `Slot` in the place of x, so x is
                       freed as soon as the forward pass lets go of it, and the replay fills the slot.
    F and its norm     save the layer input and the norm's output where no hook may go: hooks would hand
                       F's backward plain tensors in the place of its parameters, without the
                       `main_grad` that Megatron's fused gradient accumulation looks for. The storage
                       itself is emptied, under every view of it, and filled again at the same place.

A replay runs the operations of the forward pass on the same bits; it needs no random numbers, because
F is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def storage_key(tensor: Tensor) -> int:
    """Identifies a tensor's storage as long as that lives."""
    return tensor.untyped_storage()._cdata


def owns_storage(tensor: Tensor) -> bool:
    """Whether the tensor is all that its storage holds, in order."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def stream_of(tensor: Tensor) -> Any:
    """The current CUDA stream of the tensor's device; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def used_on(stream: Any, tensor: Tensor) -> None:
    """Keep the tensor's memory, once freed, from other use until `stream` has done what it has queued."""
    if stream is not None:
        tensor.record_stream(stream)


class Slot:
    """The place of a dropped tensor; whatever saved it holds the slot and, once replayed, the tensor."""

    __slots__ = ("__weakref__", "block", "dtype", "tensor")

    def __init__(self, block: Block, dtype: torch.dtype):
        self.block, self.dtype = block, dtype
        self.tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            self.block.replay()
        if self.tensor is None:
            raise RuntimeError("a dropped tensor was not brought back by the replay of its block")
        return self.tensor


class _View:
    """A view of a slot's tensor, as an operation saved it."""

    def __init__(self, slot: Slot, tensor: Tensor):
        self.slot = slot
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        tensor = self.slot.get()
        return tensor.as_strided(*self.place)


def saving(pack: Callable[[Tensor], Any]) -> AbstractContextManager[Any]:
    """Hand what operations save to `pack`, which returns a tensor to keep it or a `_View` to drop it."""
    return saved_tensors_hooks(pack, lambda saved: saved.get() if isinstance(saved, _View) else saved)


class Emptied:
    """A tensor without its bytes: the storage is emptied, and refilled at the same place."""

    def __init__(self, tensor: Tensor):
        self.storage = tensor.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.like = tensor.detach()
        # The sub-layer is done on this stream, whichever streams F had used inside.
        used_on(stream_of(tensor), tensor)
        self.storage.resize_(0)

    def refill(self) -> Tensor:
        """Take memory again; the tensor returned, of unspecified values, is for writing them."""
        self.storage.resize_(self.nbytes)
        # A tensor of its own: writing through it leaves the saved tensors' version counters alone.
        return self.like.new_empty(0).set_(self.storage, 0, self.like.size(), self.like.stride())


class Replayed(Protocol):
    """A sub-layer of a block, as its replay sees it."""

    def replay(self, x: Tensor, behind: Sequence[Replayed]) -> tuple[int, Tensor | None]:
        """Bring back what was dropped, given the streams, and maybe what the first ones `behind` it dropped.

        Returns:
            for how many sub-layers, and the streams behind those; None if they were the last.
        """

    def kept(self) -> list[Tensor]:
        """Tensors that the replay reads."""

    def restored(self) -> list[Tensor]:
        """Tensors that the replay has brought back."""


class Block:
    """The dropped tensors of consecutive sub-layers, from the forward pass to the replay.

    Args:
        first: [s, b, n*C], the streams that the block starts from, which it keeps.
    """

    def __init__(self, first: Tensor):
        self.first: Tensor | None = first.detach()
        self.sublayers: list[Replayed] = []
        self._begun = stream_of(first)  # on which its sub-layers read
        self._home: Any = None  # the stream that ended the forward pass, where tensors are on a GPU
        self._complete: Any = None
        self._replayed: Any = None

    def close(self, output: Tensor) -> None:
        """Replay when the gradient of the block's output arrives, if nobody has before."""
        self._home = stream_of(output)
        if self._home is not None:
            self._complete = self._home.record_event()
        output.register_hook(self._on_gradient)

    def _on_gradient(self, _: Tensor) -> None:
        self.replay()
        if self._replayed is not None:
            torch.cuda.current_stream(self._home.device).wait_event(self._replayed)

    def replay(self) -> None:
        """Bring the dropped tensors back; a second call does nothing.

        On another CUDA stream than the forward pass's it waits for that pass alone, and the backward pass
        waits for the replay, so a schedule may start it beside other work.
        """
        sublayers, self.sublayers = self.sublayers, []
        x, self.first = self.first, None
        if not sublayers:
            return
        assert x is not None
        here = None if self._home is None else torch.cuda.current_stream(self._home.device)
        elsewhere = here if here != self._home else None
        if elsewhere is not None:
            elsewhere.wait_event(self._complete)
        if here is not None and (elsewhere is not None or here != self._begun):
            for tensor in (x, *(t for s in sublayers for t in s.kept())):
                used_on(here, tensor)
        with torch.no_grad():
            streams: Tensor | None = x
            done = 0
            while streams is not None:
                count, streams = sublayers[done].replay(streams, sublayers[done + 1 :])
                done += count
        if elsewhere is not None:
            self._replayed = elsewhere.record_event()
            for tensor in (t for s in sublayers for t in s.restored()):
                used_on(self._home, tensor)


class StreamSlots:
    """What the operations of one sub-layer save of tensors that its block drops.

    Args:
        block: theirs.
        everything: drop all that `reading` saves, not only tensors given to `drop`.
    """

    def __init__(self, block: Block, everything: bool):
        self.block, self.everything = block, everything
        self.read: list[ref[Slot] | None] = []  # by order of saving, where everything is dropped
        self._slots: dict[int, Slot] = {}
        self._kept: set[int] = set()
        self._alive: list[Tensor] = []  # a storage's key means nothing once the storage is gone

    def drop(self, tensor: Tensor) -> ref[Slot] | None:
        """Save a slot instead of `tensor` everywhere, if the tensor is all of its storage."""
        if not owns_storage(tensor):
            return None
        slot = Slot(self.block, tensor.dtype)
        self._alive.append(tensor.detach())
        self._slots[storage_key(tensor)] = slot
        return ref(slot)

    def keep(self, tensors: list[Tensor]) -> None:
        """Never drop these: parameters, and the first streams of the block."""
        self._kept.update(storage_key(t) for t in tensors)

    def reading(self) -> AbstractContextManager[Any]:
        """Around `pre`."""
        return saving(self._pack_read if self.everything else self._pack)

    def writing(self) -> AbstractContextManager[Any]:
        """Around `post_res`."""
        return saving(self._pack)

    def dropped(self) -> list[int]:
        """Storage keys of the dropped tensors."""
        return list(self._slots)

    def close(self) -> None:
        """Let go of the dropped tensors, which only the forward pass may still hold then."""
        for tensor in self._alive:
            used_on(stream_of(tensor), tensor)
        self._slots, self._alive = {}, []

    def _pack(self, tensor: Tensor) -> Any:
        slot = self._slots.get(storage_key(tensor))
        if slot is None or slot.dtype != tensor.dtype:
            # Detached, since an operation that saves its own output would otherwise keep itself alive.
            return tensor.detach()
        return _View(slot, tensor)

    def _pack_read(self, tensor: Tensor) -> Any:
        key = storage_key(tensor)
        if key not in self._slots and key not in self._kept:
            self.drop(tensor)
        packed = self._pack(tensor)
        self.read.append(ref(packed.slot) if isinstance(packed, _View) else None)
        return packed
