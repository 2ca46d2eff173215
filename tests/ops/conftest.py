"""Fixtures of several files of this folder."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new floating tensors with NaN: an element that nobody writes shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(make):
        def poisoned_make(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned_make

    monkeypatch.setattr(torch, "empty", fill(empty))
    monkeypatch.setattr(torch, "empty_like", fill(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(new_empty))
