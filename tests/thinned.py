"""Products of settings of which the default run has every value, and not every combination."""

from collections.abc import Iterable
from typing import Any

import pytest


def each_value(*axes: Iterable[Any], also: Iterable[tuple[Any, ...]] = ()) -> list[Any]:
    """All combinations of a value of each axis, most of them marked slow.

    By default run as many as the longest axis has values, and those in `also`: number i takes the i-th value
    of every axis, and begins again with those of a shorter one.
    """
    lists = [list(axis) for axis in axes]
    longest = max(map(len, lists))
    chosen = [tuple(values[i % len(values)] for values in lists) for i in range(longest)]
    chosen += [tuple(values) for values in also]
    combinations: list[tuple[Any, ...]] = [()]
    for values in lists:
        combinations = [(*before, value) for before in combinations for value in values]
    return [pytest.param(*c, marks=() if c in chosen else pytest.mark.slow) for c in combinations]
