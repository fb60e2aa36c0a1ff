"""Command lines made from dataclasses: a setting is stated once, on its field, with type, default and help.

A command is a module with a dataclass `Arguments` and `run(arguments)`. tyro makes the command line; what a field's
metadata says beside its help (see `setting` in runtime.experts.config) is added here:

    choices   of a string                      parse     text → value; its errors are the user's
    flag      its name, where not the field's  least     of a number, or of each of several
    positional  it is given without a flag
    group     of a dataclass: its settings are on the command line as they are, but for those named here
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
import yaml
from fluxmoe.runtime.memory.budget import parse_bytes

from .results import UsageError

T = TypeVar("T")
_CONFIG = re.compile(r".+\.ya?ml", re.IGNORECASE)


def option(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a command's arguments; without a default it is required. more: see above."""
    return field(default=default, metadata={"help": help, **more})


def group(*omit: str, only: Collection[str] = ()) -> Any:
    """A field that is a dataclass of settings, all of them, but for `omit`, or `only` some."""
    return field(metadata={"group": (omit, only)})


def parse(arguments: type[T], argv: Sequence[str], prog: str, about: str | None = None) -> T:
    """What a command line says. UsageError, and what constructors raise, for one that is invalid.

    `--config FILE.yaml` stands for the settings in that file; those on the command line win.
    """
    said, mirror = io.StringIO(), _mirror(arguments)
    found: Any
    try:
        with redirect_stderr(said):
            found = tyro.cli(
                mirror, args=list(_expand(argv)), prog=prog, description=about, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as exited:
        if not exited.code:
            raise
        # A box of several lines, the first its title.
        lines = [line.strip("│╰╯─ ") for line in said.getvalue().splitlines() if not line.startswith("╭")]
        text = re.split(r"For full helptext", " ".join(filter(None, lines)))[0].strip()
        raise UsageError(f"{text} (see {prog} --help)") from None
    return _build(arguments, found)


def _expand(argv: Sequence[str]) -> Iterable[str]:
    """The command line, the settings of its files first."""
    rest, said = [], list(argv)
    while said:
        token = said.pop(0)
        if token == "--config" and said and _CONFIG.fullmatch(said[0]):
            yield from _read(Path(said.pop(0)))
        else:
            rest.append(token)
    yield from rest


def given(argv: Sequence[str]) -> set[str]:
    """Names of the flags on a command line and in its files, without dashes before them."""
    return {word[2:].partition("=")[0].replace("_", "-") for word in _expand(argv) if word.startswith("--")}


def _read(path: Path) -> Iterable[str]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings, as `max-batch: 32`, a line each")
    for name, value in settings.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield from (f"--{flag}", *map(str, value if isinstance(value, list) else [value]))


def flags(cls: type, omit: Collection[str] = (), only: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """What a command line may say, each with its choices: () where it takes anything, or nothing."""
    hints, found = get_type_hints(cls), dict[str, tuple[str, ...]]()
    for f in _shown(cls, omit, only):
        if "group" in f.metadata:
            found |= flags(hints[f.name], *f.metadata["group"])
        elif not f.metadata.get("positional"):
            found[f"--{flag_of(f)}"] = tuple(f.metadata.get("choices", ()))
            found |= {f"--no-{flag_of(f)}": ()} if hints[f.name] is bool else {}
    return found


def flag_of(f: Field) -> str:
    return str(f.metadata.get("flag", f.name)).replace("_", "-")


def _shown(cls: type, omit: Collection[str] = (), only: Collection[str] = ()) -> list[Field]:
    """Fields that are on the command line."""
    named = [f for f in fields(cls) if f.init and f.name not in omit and (not only or f.name in only)]
    return [f for f in named if "group" in f.metadata or f.metadata.get("help") is not None]


def _mirror(cls: type, omit: Collection[str] = (), only: Collection[str] = ()) -> type:
    """A dataclass that tyro reads: what is parsed by us is text there, and choices are literals."""
    hints = get_type_hints(cls)
    made: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for f in _shown(cls, omit, only):
        if "group" in f.metadata:
            made.append((f.name, _mirror(hints[f.name], *f.metadata["group"])))
            continue
        hint: Any = hints[f.name]
        several, optional = getattr(hint, "__origin__", None) is tuple, type(None) in get_args(hint)
        one: Any = get_args(hint)[0] if several or optional else hint
        metavar = f.metadata.get("metavar")
        if "parse" in f.metadata:
            one, optional = str, f.default is not MISSING and not several
        if choices := tuple(f.metadata.get("choices", ())):
            one, metavar = Literal.__getitem__(choices), metavar or "{" + ",".join(choices) + "}"
        if optional and metavar is None:
            metavar = one.__name__.upper()
        hint = tuple.__class_getitem__((one, ...)) if several else one | None if optional else one
        shown = "" if f.default in (None, ()) or "(default" in f.metadata["help"] else None
        if f.metadata.get("positional"):
            hint = Annotated[hint, tyro.conf.Positional]
        hint = Annotated[
            hint, tyro.conf.arg(name=flag_of(f).replace("-", "_"), metavar=metavar, help_behavior_hint=shown)
        ]
        # What is parsed by us has no default that tyro could check; `_build` knows it.
        value = None if "parse" in f.metadata and not several else f.default
        default = () if f.default is MISSING else (field(default=value, metadata={"help": f.metadata["help"]}),)
        made.append((f.name, hint, *default) if default else (f.name, hint, field(metadata=f.metadata)))
    return make_dataclass(cls.__name__, made, kw_only=True, frozen=True)


def _build(cls: type[T], found: Any) -> T:
    """The command's own dataclass of what tyro found."""
    hints, values = get_type_hints(cls), dict[str, Any]()
    for f in fields(cls):  # type: ignore[arg-type]
        if not hasattr(found, f.name):
            continue
        value = getattr(found, f.name)
        if is_dataclass(hints[f.name]) and "group" in f.metadata:
            value = _build(hints[f.name], value)
        elif (parse_text := f.metadata.get("parse")) and value != f.default:
            if isinstance(value, tuple):
                value = tuple(map(parse_text, value))
            else:
                value = f.default if value is None else parse_text(value)
        check(f, value)
        values[f.name] = value
    return cls(**values)


def check(f: Field, value: Any) -> None:
    """UsageError for what a field does not take: less than its `least`, or none of its choices."""
    least, choices = f.metadata.get("least"), f.metadata.get("choices")
    for each in value if isinstance(value, tuple) else () if value is None else (value,):
        if least is not None and each < least:
            raise UsageError(f"--{flag_of(f)} must be at least {least}, got {each}")
        if choices and each not in choices:
            raise UsageError(f"--{flag_of(f)} must be one of {', '.join(choices)}, got {each}")


def number_of_bytes(text: str) -> int:
    """Of 8GB and the like; UsageError for `all`, which a budget may be, too."""
    if (nbytes := parse_bytes(text)) is None:
        raise UsageError(f"{text!r} is no number of bytes, such as 8GB")
    return nbytes


def known(name: str, names: Iterable[str], what: str) -> str:
    """The one of `names` that is meant, whatever its case, dashes and owner; UsageError says which there are."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.rsplit("/", 1)[-1].lower())

    by_plain = {plain(each): each for each in names}
    if plain(name) in by_plain:
        return by_plain[plain(name)]
    close = difflib.get_close_matches(plain(name), by_plain, 1)
    hint = f"; did you mean {by_plain[close[0]]}?" if close else ""
    raise UsageError(f"no {what} {name!r}: there is {', '.join(by_plain.values())}{hint}")
