"""numba's cache of machine code on disk, which knows the files that a kernel is made of, and holds large ones once.

numba compiles a kernel again when the kernel's own file has changed. Ours inline helpers of the files beside it: a
change to one of those alone would leave old machine code running.

What a kernel calls is compiled again inside it, and inside each that calls that one, loops of threads apart. A kernel
that many call, and that is large, is better a `Linked` one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.typing import Signature
from numba.extending import typeof_impl


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, …)`, compiled again when any file of the function's folder or the one above changes."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(cache=True, **options)(function)
        _stamp(dispatcher, function)
        return dispatcher

    return compiled


class Linked:
    """A kernel that others call by a symbol: `@Linked.of(signature)`; it must not raise. Before one of them runs, in
    each process, it must be linked, which compiles it if the disk has none."""

    def __init__(self, function: Callable[..., Any], signature: Signature) -> None:
        self.external = types.ExternalFunction(f"fluxmoe_{function.__name__}", signature)
        self._kernel = CFunc(function, (signature.args, signature.return_type), locals={}, options={})
        self._kernel.enable_caching()
        _stamp(self._kernel, function)

    @classmethod
    def of(cls, signature: Signature) -> Callable[[Callable[..., Any]], Linked]:
        return lambda function: cls(function, signature)

    def link(self) -> None:
        """Idempotent."""
        if self._kernel.address is None:
            self._kernel.compile()
            llvmlite.binding.add_symbol(self.external.symbol, self._kernel.address)

    def __call__(self, *arguments: int) -> Any:
        """From Python."""
        self.link()
        return self._kernel.ctypes(*arguments)


@typeof_impl.register(Linked)
def _type_of_linked(kernel: Linked, context: object) -> types.ExternalFunction:
    return kernel.external


def _stamp(kernel: Any, function: Callable[..., Any]) -> None:
    """An index whose stamp is another counts as empty. numba has no public way to say what the stamp is."""
    index = kernel._cache._cache_file
    index._source_stamp = (index._source_stamp, _digest(Path(inspect.getfile(function)).parent))


@cache
def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((*folder.parent.glob("*.py"), *folder.glob("*.py"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
