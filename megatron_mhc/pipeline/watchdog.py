"""Looks on while a device waits for other ranks, since no host sees such a wait fail."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

LAST_RESORT = 20.0  # seconds that a host may stand still after its device's waits were let go


class Awaited(NamedTuple):
    """A note that is to reach a value, and the error if it does not."""

    note: int
    value: int
    said: str


class Watchdog:
    """A thread that reads notes which a device writes; it asks the driver nothing, which might not answer.

    Nothing has happened for `timeout` seconds although something is awaited: `failed` says what, and
    `let_go` is called, which is to end the waits of this rank's device. If the device stands still after that
    (with one hardware queue nothing passes a wait), the process ends, as it does by NCCL's watchdog.

    Args:
        read: a note by its number.
        let_go: called on a thread of its own.
    """

    def __init__(
        self,
        read: Callable[[int], int],
        reached: Callable[[int, int], bool],
        timeout: float,
        let_go: Callable[[], None],
        end: Callable[[str], None] | None = None,
    ):
        self._read, self._reached, self._timeout, self._let_go = read, reached, timeout, let_go
        self._end = end or _end_process
        self.failed: str | None = None
        self._lock = threading.Lock()
        self._awaited: list[Awaited] = []
        self._seen = time.monotonic()  # when something that was awaited came
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, awaited: Awaited) -> None:
        """Something is awaited from now on."""
        with self._lock:
            if not self._awaited:
                self._seen = time.monotonic()
            self._awaited.append(awaited)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="mhc pipeline watchdog")
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def pending(self) -> Awaited | None:
        """The first that is not there."""
        with self._lock:
            left = [one for one in self._awaited if not self._reached(self._read(one.note), one.value)]
            if len(left) < len(self._awaited):
                self._seen = time.monotonic()
            self._awaited = left
            return left[0] if left else None

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 10)):
            first = self.pending()
            if first is None or time.monotonic() - self._seen < self._timeout:
                continue
            self.failed = first.said
            threading.Thread(target=self._let_go, daemon=True).start()
            deadline = time.monotonic() + LAST_RESORT
            while not self._stopped.wait(0.1):
                if self.pending() is None:
                    return  # the step raises `failed`
                if time.monotonic() > deadline:
                    self._end(first.said)
                    return
            return


def _end_process(said: str) -> None:
    print(
        f"PipelineError: {said}; its device stands still, so this process ends", file=sys.stderr, flush=True
    )
    os._exit(1)
