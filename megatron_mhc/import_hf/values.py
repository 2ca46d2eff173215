"""config.json, whose values are checked as they are read: a complaint names the key and its value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_mhc.convert.read import naming

MOST = 2**31 - 1  # of a size
_ABSENT: Any = object()


class Values:
    """A JSON object, from which every key has to be taken.

    Raises:
        ValueError: of every method, naming the key.
    """

    def __init__(self, content: Any, where: str = ""):
        if not isinstance(content, dict):
            raise ValueError(
                f"{where or 'it'} is a {type(content).__name__}, not an object of keys and values"
            )
        self.left, self.where = dict(content), where and where + "."

    @classmethod
    def of(cls, file: Path) -> Values:
        """Read a file."""
        with naming(str(file)):
            return cls(json.loads(file.read_text()))

    def take(self, key: str, default: Any = _ABSENT) -> Any:
        """The value of a key, or the default where it is absent or null."""
        value = self.left.pop(key, None)
        if value is not None:
            return value
        if default is _ABSENT:
            raise ValueError(f"{self.where}{key} is absent: give the value with which the model was trained")
        return default

    def size(self, key: str, default: Any = _ABSENT, least: int = 1) -> int:
        """A whole number."""
        value = self.take(key, default)
        if type(value) is not int or not least <= value <= MOST:
            raise ValueError(f"{self.where}{key} is {value!r:.80}, not a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = _ABSENT) -> float:
        """A finite number."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{self.where}{key} is {value!r:.80}, not a finite number")
        return value

    def switch(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise ValueError(f"{self.where}{key} is {value!r:.80}, not true or false")
        return value

    def expect(
        self, key: str, *known: Any, default: Any = _ABSENT, why: str = "Megatron has no such form"
    ) -> None:
        """Refuse every other value; one that is absent counts as the default, or as the first known one."""
        value = self.take(key, known[0] if default is _ABSENT else default)
        if not any(type(value) is type(one) and value == one for one in known):
            raise ValueError(
                f"{self.where}{key} is {value!r:.80}: {why}, only of {', '.join(map(repr, known))}"
            )

    def inside(self, key: str) -> Values | None:
        """An object inside; None where it is absent."""
        value = self.take(key, None)
        return None if value is None else Values(value, self.where + key)

    def drop(self, *keys: str) -> None:
        """Take keys that have no part in a forward pass."""
        for key in keys:
            self.left.pop(key, None)

    def end(self) -> None:
        """Refuse keys that nobody took."""
        if self.left:
            key = min(self.left, key=str)
            raise ValueError(
                f"{self.where}{key} is {self.left[key]!r:.80}: not a known key of this model; take it out of "
                "the file if it does not change what the model computes"
            )
