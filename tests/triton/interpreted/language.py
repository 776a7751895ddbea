"""Triton's interpreter remaps the whole language anew at every call of a device function, a third of these tests' time.

:func:`install` has it done once per launch and module of the language. What the kernels compute is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(function: Callable) -> frozenset[str]:
    """The modules that remapping for this function changes."""
    return frozenset(module.__name__ for module in (tl, tl.core) if module in function.__globals__.values())


def install() -> None:
    """Change the interpreter of this process."""
    remap, scope = interpreter._patch_lang, interpreter._LangPatchScope
    if isinstance(remap, functools.partial):
        return
    remapped: set[str] = set()

    class Scope(scope):
        def restore(self) -> None:  # the end of a launch; calls inside of it leave their scope behind
            super().restore()
            remapped.clear()

    def remap_once(remap, function: Callable) -> Scope:
        languages = _languages(function)
        if languages and languages <= remapped:
            return Scope()
        made = remap(function)
        remapped.update(languages)
        return made

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = functools.partial(remap_once, remap)
