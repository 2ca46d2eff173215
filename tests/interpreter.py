"""Triton's interpreter without what it does in vain, which is half of its time."""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any


def speed_up() -> None:
    """Have a function that a kernel calls leave triton.language alone where its launch has patched it.

    The interpreter looks through all members of triton.language in every such call, for none to patch.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another Triton's, which is only slower
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    packages = tl, tl.core, tl.core.tensor
    builtin = {p: next(n for n, m in inspect.getmembers(p) if tl.core.is_builtin(m)) for p in packages}

    @functools.cache
    def seen_by(fn: FunctionType) -> list[Any]:
        return [tl.core.tensor, *(p for p in (tl, tl.core) if any(p is v for v in fn.__globals__.values()))]

    def patch_once(fn: FunctionType) -> Any:
        if any(tl.core.is_builtin(getattr(package, builtin[package])) for package in seen_by(fn)):
            return patch(fn)
        return nothing

    interpreter._patch_lang = patch_once
