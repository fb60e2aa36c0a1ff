"""Triton's interpreter without what it repeats, which is half of the time of the tests that it runs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Each call of a device function looks through the whole language for what is not patched yet, and each tensor
    makes the table of dtypes anew: here both are found once. And each sum of integers is made again in 64 bits for an
    assertion that only debugging lets through."""
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _numpy_dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


@cache
def _builtins(place: object) -> list[tuple[str, object]]:
    """As they are before the first patch."""
    return [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _patch_builtin(place: object, *how: object) -> None:
    for name, member in _builtins(place):
        if getattr(place, name) is member:
            interpreter._patch_attr(place, name, member, *how)


_numpy_dtype_of = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_dtype_of(scalar)
