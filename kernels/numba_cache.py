"""numba's cache of machine code on disk, which knows the files that a kernel is made of.

numba compiles a kernel again when the kernel's own file has changed. Ours inline helpers of the files beside it: a
change to one of those alone would leave old machine code running.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, …)`, compiled again when any file of the function's folder or the one above changes."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = njit(cache=True, **options)(function)
        # An index whose stamp is another counts as empty. numba has no public way to say what the stamp is.
        index = dispatcher._cache._cache_file
        index._source_stamp = (index._source_stamp, _digest(Path(inspect.getfile(function)).parent))
        return dispatcher

    return compiled


@cache
def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((*folder.parent.glob("*.py"), *folder.glob("*.py"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
