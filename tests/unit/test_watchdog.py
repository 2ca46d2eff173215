"""A watchdog on notes that never come: it says what, lets go, and ends the process as the last resort."""

import threading
import time

from megatron_mhc.pipeline import watchdog
from megatron_mhc.pipeline.memory import reached
from megatron_mhc.pipeline.watchdog import Awaited, Watchdog

SECONDS = 0.3


class Notes:
    def __init__(self, frees=True):
        self.words, self.frees, self.ended, self.let_go_by = [0, 0], frees, [], None

    def let_go(self):
        self.let_go_by = threading.current_thread()
        if self.frees:
            self.words = [100, 100]

    def watch(self):
        return Watchdog(self.words_at, reached, SECONDS, self.let_go, self.ended.append)

    def words_at(self, index):
        return self.words[index]


def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def test_what_comes_in_time_is_no_failure():
    notes = Notes()
    dog = notes.watch()
    for value in range(1, 6):  # each within the timeout, all of them not
        dog.expect(Awaited(0, value, f"message {value}"))
        time.sleep(SECONDS / 2)
        notes.words[0] = value
    assert until(lambda: dog.pending() is None) and dog.failed is None
    time.sleep(2 * SECONDS)  # nothing is awaited
    assert dog.failed is None
    dog.stop()


def test_the_first_that_does_not_come_is_named_and_waits_are_let_go():
    notes = Notes()
    dog = notes.watch()
    dog.expect(Awaited(0, 1, "the first"))
    dog.expect(Awaited(1, 1, "the second"))
    dog.expect(Awaited(0, 2, "the third"))
    notes.words[0] = 1
    assert until(lambda: dog.failed) == "the second"
    assert until(lambda: notes.let_go_by) is not threading.main_thread()
    assert until(lambda: dog.pending() is None) and notes.ended == []
    dog.stop()


def test_a_device_that_stands_still_ends_the_process(monkeypatch):
    monkeypatch.setattr(watchdog, "LAST_RESORT", 0.2)
    notes = Notes(frees=False)
    dog = notes.watch()
    dog.expect(Awaited(0, 1, "a message"))
    assert until(lambda: notes.ended) == ["a message"]


def test_a_stopped_one_says_nothing():
    notes = Notes()
    dog = notes.watch()
    dog.expect(Awaited(0, 1, "a message"))
    dog.stop()
    time.sleep(3 * SECONDS)
    assert dog.failed is None and notes.let_go_by is None
