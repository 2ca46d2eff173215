"""A section of the report, and how errors and paths are written in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Row = tuple[str, str]


class Part:
    """A section of the report; what it finds goes into `rows` and `in_the_way`."""

    title = ""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.in_the_way: list[str] = []

    def say(self, name: str, text: str) -> None:
        self.rows.append((name, text))

    def asks(self, question: Callable[[], Any]) -> Any:
        """The answer; where it raises, None, and what it says is in the way."""
        try:
            return question()
        except Exception as error:
            self.in_the_way.append(one_line(error))
            return None


def one_line(error: BaseException) -> str:
    """One line of an error; a ValueError of ours speaks for itself."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def shortened(text: str) -> str:
    """Without the home folder, which has the user's name, or line breaks."""
    home = os.path.expanduser("~").rstrip("/")
    return " ".join((text.replace(home, "~") if len(home) > 1 else text).split())
