"""Triton's interpreter without what it repeats, which is most of the time of the tests that it runs."""

from __future__ import annotations

import builtins
import inspect
import types
from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def speed_up() -> None:
    """Each call of a device function looks through the whole language for what is not patched yet, each tensor makes
    the table of dtypes anew, and each operation checks its shape, one number after another: here all are found once.
    And each sum of integers is made again in 64 bits for an assertion that only debugging lets through."""
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _numpy_dtype
    interpreter._convert_float = _convert_float
    core.block_type.__init__ = _make_block_type
    core.tensor.__init__ = _make_tensor
    interpreter.TritonSemantic.broadcast_impl_value = _broadcast
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


_patch_language = interpreter._patch_lang
# What the launch that runs has patched; empty between launches.
_patched: set[str] = set()


class _Scope(interpreter._LangPatchScope):
    def restore(self) -> None:
        super().restore()
        _patched.clear()


def _patch_lang(function: types.FunctionType) -> interpreter._LangPatchScope:
    """Of the modules that a function sees, none that its launch has patched already."""
    seen = _languages(function)
    if seen <= _patched:
        return _Scope()
    scope = _Scope()
    scope._changes = _patch_language(function)._changes
    _patched.update(seen)
    return scope


@cache
def _languages(function: types.FunctionType) -> frozenset[str]:
    modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in modules if module in (tl, core))


_numpy_dtype_of = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_dtype_of(scalar)


_convert = interpreter._convert_float


def _convert_float(values: np.ndarray, source: tl.dtype, to: tl.dtype, rounding: object) -> np.ndarray:
    """bf16 is the upper half of fp32, whose lower half is cut off where no rounding is asked for."""
    if rounding is None and (source, to) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
    if rounding is None and (source, to) == (tl.float32, tl.bfloat16):
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return _convert(values, source, to, rounding)


_block_type_init, _tensor_init = core.block_type.__init__, core.tensor.__init__
_checked: dict[tuple[int, ...], tuple[object, int, str]] = {}
_sizes: dict[tuple[int, ...], tuple[object, object]] = {}


def _make_block_type(self: core.block_type, element: tl.dtype, shape: list | core.tuple) -> None:
    key = builtins.tuple([side if type(side) is int else core._unwrap_if_constexpr(side) for side in shape])
    known = _checked.get(key)
    if known is None:
        _block_type_init(self, element, shape)
        _checked[key] = self.shape, self.numel, str(self.shape)
        return
    self.element_ty = element
    self.shape, self.numel, text = known
    self.name = f"<{text}, {element}>"


def _make_tensor(self: core.tensor, handle: object, of: tl.dtype) -> None:
    key = builtins.tuple(of.shape.values) if of.is_block() else ()
    known = _sizes.get(key)
    if known is None:
        _tensor_init(self, handle, of)
        _sizes[key] = self.numel, self.shape
        return
    self.handle, self.type, self.dtype = handle, of, of.scalar
    self.numel, self.shape = known


_broadcast_to_common_shape = interpreter.TritonSemantic.broadcast_impl_value


def _broadcast(self: object, lhs: core.tensor, rhs: core.tensor) -> tuple[core.tensor, core.tensor]:
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
        return lhs, rhs
    return _broadcast_to_common_shape(self, lhs, rhs)
