"""Register, revert and report the replaced Megatron symbols of `targets`, and check those of `uses`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from types import CodeType, TracebackType
from typing import Any

from megatron_mhc.version import SUPPORTED, SUPPORTED_BRIDGE, check_version

check_version()  # another Megatron may lack what is imported below

from megatron_mhc.hooks.targets import BRIDGE_HOOKS, FSDP_HOOKS, HOOKS, SCHEDULE_HOOKS, TRAINING_HOOKS, Hook
from megatron_mhc.hooks.uses import BRIDGE_USES, FSDP_USES, SCHEDULE_USES, TRAINING_USES, USES, Use
from megatron_mhc.hyper_connection import operations
from megatron_mhc.releases import ABSENT, KNOWN, Other, release

_lock = threading.RLock()
_registrations: list[Handle] = []
_replaced: dict[str, _Replaced] = {}  # by target


class Handle:
    """One registration; the symbols are Megatron's own again when every registration is reverted."""

    @property
    def active(self) -> bool:
        return self in _registrations

    def revert(self) -> None:
        """End this registration, or leave its `with` block; a second call does nothing."""
        with _lock:
            if self.active:
                _registrations.remove(self)
                if not _registrations:
                    _restore()

    def report(self) -> str:
        """A table of the replaced symbols and why each is replaced, and what the models alive now run.

        Where --mhc-pipeline-schedule auto chose, it says what and why.
        """
        from megatron.core import __version__ as version

        from megatron_mhc.pipeline.auto import decisions

        state = "registered" if _registrations else "not registered"
        lines = [f"megatron_mhc hooks on megatron-core {version} ({SUPPORTED} and main supported): {state}"]
        hooks = [one.hook for one in _replaced.values() if one.on] or HOOKS
        lines += [f"  {hook.target}\n      {hook.reason}" for hook in hooks]
        lines += [f"  {line}" for line in operations() or ["no connection is built yet"]]
        lines += [f"  {line}" for line in decisions()]
        return "\n".join(lines)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


def register(
    training: bool = False, schedule: bool = False, fsdp: bool = False, bridge: bool = False
) -> Handle:
    """Replace the symbols of `targets.HOOKS` until this registration, and every other, is reverted.

    Models without mHC run the original code either way.

    Args:
        training: also those of `targets.TRAINING_HOOKS`, which import megatron.training.
        schedule: also those of `targets.SCHEDULE_HOOKS`, which import it too.
        fsdp: also those of `targets.FSDP_HOOKS`, which import it too.
        bridge: also those of `targets.BRIDGE_HOOKS`, which import megatron.bridge.

    Raises:
        ValueError: an unsupported Megatron version, a changed signature, a symbol that somebody else
            replaced, or a Megatron that has hyper-connections of its own.
    """
    with _lock:
        check_version()
        uses = TRAINING_USES * training + SCHEDULE_USES * schedule + FSDP_USES * fsdp
        check_uses(USES + uses + BRIDGE_USES * bridge)
        more = TRAINING_HOOKS * training + SCHEDULE_HOOKS * schedule + FSDP_HOOKS * fsdp
        _install(HOOKS + more + BRIDGE_HOOKS * bridge)
        handle = Handle()
        _registrations.append(handle)
        return handle


def require(training: bool = False, schedule: bool = False, fsdp: bool = False, bridge: bool = False) -> None:
    """`register` for the doors: they join the program's own registration, and stay where there is none."""
    with _lock:
        handle = register(training, schedule, fsdp, bridge)
        if len(_registrations) > 1:
            handle.revert()


def revert_all() -> None:
    """End every registration, those of the doors too."""
    with _lock:
        _registrations.clear()
        _restore()


class _Replaced:
    """A symbol, and the function in its place, which runs Megatron's code while it is off.

    Somebody may have patched that function in turn. What they keep of it cannot be taken back, so it is
    switched off where it is, and on again by the next `register`.
    """

    def __init__(self, hook: Hook, owner: Any, name: str, original: Callable[..., Any]):
        replacement = hook.replacement(original)

        @functools.wraps(replacement)
        def switch(*args: Any, **kwargs: Any) -> Any:
            return (replacement if self.on else original)(*args, **kwargs)

        self.hook, self.owner, self.name, self.switch, self.on = hook, owner, name, switch, False
        self._stored = self._current()
        self._above: Any = None  # somebody else's patch that stood there when it was switched off

    def _current(self) -> Any:
        return inspect.getattr_static(self.owner, self.name)  # as it is stored: a lookup would bind it

    def is_in_place(self) -> bool:
        """Whether the symbol is this one, or a patch that was put on it."""
        current = self._current()
        return current is not self._stored if self.on else current in (self.switch, self._above)

    def turn_on(self) -> None:
        if self._current() is self._stored:
            setattr(self.owner, self.name, self.switch)
        self.on = True

    def turn_off(self) -> bool:
        """Put the original back; returns False where somebody else's patch, which is left alone, is on it."""
        self.on = False
        current = self._current()
        if current is self.switch:
            setattr(self.owner, self.name, self._stored)
            return True
        self._above = current
        return False


def _install(hooks: tuple[Hook, ...]) -> None:
    # Everything is checked before anything is replaced.
    found = []
    for hook in hooks:
        if release().symbols.get(hook.target) is ABSENT:
            continue
        one = _replaced.get(hook.target)
        if one is None or not one.is_in_place():
            one = _Replaced(hook, *_resolve(hook))
        found.append(one)
    for one in found:
        if not one.on:
            one.turn_on()
        _replaced[one.hook.target] = one


def _restore() -> None:
    for target, one in list(_replaced.items()):
        if one.turn_off():
            del _replaced[target]


def check_uses(uses: tuple[Use, ...]) -> None:
    """Raise ValueError unless Megatron's symbols are what the rows of `uses.py` say.

    One that somebody else has wrapped is left alone.
    """
    for use in map(installed, uses):
        if use is None:
            continue
        _, _, found = _find(use.target)
        if _is_somebody_elses(found):
            continue
        if use.parameters is not None:
            _check_parameters(use.target, found, tuple(use.parameters.split(", ")) if use.parameters else ())
        if use.names and (gone := set(use.names) - set(_names(inspect.unwrap(found).__code__))):
            raise ValueError(f"{use.target} knows no {', '.join(sorted(gone))}: {_remedy(use.target)}")


def installed(row: Use) -> Use | None:
    """A row of `uses.py` as the installed release has it; None where that has no such symbol."""
    other = release().symbols.get(row.target)
    if other is ABSENT:
        return None
    given = {name: value for name, value in (other or Other())._asdict().items() if value is not None}
    if "name" in given:
        given["target"] = given.pop("name")
    return dataclasses.replace(row, **given)


def _is_somebody_elses(found: Any) -> bool:
    """Whether a function's code lies in another file than the module that it says it is of."""
    code = getattr(inspect.unwrap(found), "__code__", None) if callable(found) else None
    module = sys.modules.get(getattr(found, "__module__", None) or "")
    return code is not None and code.co_filename != getattr(module, "__file__", None)


def _names(code: CodeType) -> Iterator[str]:
    """The attributes and strings in a function's code and in that of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _resolve(hook: Hook) -> tuple[Any, str, Callable[..., Any]]:
    other = release().symbols.get(hook.target, Other())
    owner, name, original = _find(other.name or hook.target)
    defined_in = other.name.split(":")[0] if other.name else hook.defined_in
    if original.__module__ != defined_in or hasattr(original, "__wrapped__"):
        raise ValueError(
            f"{hook.target} was replaced by {original.__module__}: start without that patch, "
            "or call megatron_mhc.register() before it is applied"
        )
    parameters = tuple(other.parameters.split(", ")) if other.parameters else hook.parameters
    _check_parameters(hook.target, original, parameters)
    return owner, name, original


def _find(target: str) -> tuple[Any, str, Any]:
    """The owner of a symbol, its name in it, and the symbol."""
    module, path = target.split(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    found = getattr(owner, name, None)
    if found is None:
        raise ValueError(f"{target} does not exist: {_remedy(target)}")
    return owner, name, found


def _check_parameters(target: str, found: Callable[..., Any], expected: tuple[str, ...]) -> None:
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != expected:
        raise ValueError(
            f"{target}, of {getattr(found, '__module__', None)}, takes {parameters}, expected {expected}: "
            f"{_remedy(target)}"
        )


def _remedy(target: str) -> str:
    if target.startswith("megatron.bridge"):
        return f"install megatron-bridge {SUPPORTED_BRIDGE}"
    return "install another torch" if target.startswith("torch") else f"install {KNOWN}"
