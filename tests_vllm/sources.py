"""vLLM's Python files as they are, installed or in a wheel that is not: classes and their parameters, by reading."""

from __future__ import annotations

import ast
import zipfile
from importlib.util import find_spec
from pathlib import Path


class Sources:
    """wheel: a file of pip's; None: vLLM as it is installed."""

    def __init__(self, wheel: str | None) -> None:
        self.name = Path(wheel).name if wheel else "installed"
        if wheel:
            self._root: zipfile.Path | Path = zipfile.Path(wheel) / "vllm"
        else:
            (folder,) = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
            self._root = Path(folder)

    def definition(self, path: str, *names: str) -> ast.AST:
        """A class, a function, or what is inside: ("a/b.py", "Class", "method"). LookupError says what is not there."""
        try:
            node: ast.AST = ast.parse((self._root / path).read_text(encoding="utf-8"))
        except (FileNotFoundError, KeyError):
            raise LookupError(f"{self.name} has no {path}") from None
        for name in names:
            inside = (each for each in ast.walk(node) if isinstance(each, _NAMED) and each.name == name)
            if (found := next(inside, None)) is None:
                raise LookupError(f"{path} of {self.name} has no {'.'.join(names)}")
            node = found
        return node

    def parameters(self, path: str, *names: str) -> list[str]:
        """Names of a function's parameters, but for **keywords."""
        function = self.definition(path, *names)
        assert isinstance(function, ast.FunctionDef), f"{names} is a function"
        return [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]

    def calls(self, path: str, *names: str) -> list[str]:
        """Names of what a function calls, in the order of its text."""
        calls = [each for each in ast.walk(self.definition(path, *names)) if isinstance(each, ast.Call)]
        placed = sorted((each.func.end_lineno or 0, each.func.end_col_offset or 0, each.func) for each in calls)
        return [func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for _, _, func in placed]

    def says(self, path: str, *names: str) -> set[str]:
        """All names and attributes that a definition mentions, fields of classes too."""
        walked = list(ast.walk(self.definition(path, *names)))
        return (
            {each.attr for each in walked if isinstance(each, ast.Attribute)}
            | {each.id for each in walked if isinstance(each, ast.Name)}
            | {each.name for each in walked if isinstance(each, _NAMED)}
        )


_NAMED = (ast.ClassDef, ast.FunctionDef)
