"""Counts the bytes of tensors that are alive, on any device, as operations run."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Watches every storage that an operation returns; an emptied storage counts 0.

    Args:
        peak: also look after every operation, for the highest count.
    """

    def __init__(self, peak=False):
        super().__init__()
        self.storages, self.with_peak, self.peak = {}, peak, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # A key may be that of a storage that is gone: the newer one takes its place.
                known = self.storages.get(storage._cdata)
                if known is None or known.expired():
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        if self.with_peak:
            self.peak = max(self.peak, self.now())
        return out

    def now(self):
        """Bytes alive at this moment."""
        total = 0
        for key, reference in list(self.storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()
        return total
