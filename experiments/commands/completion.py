"""A script with which a shell completes fluxmoe's commands, their flags, and the choices of those that have some.

    source <(fluxmoe completion bash)
    source <(fluxmoe completion zsh)

It names what this version has: make it anew after an update. (Seconds, once: it asks every command.)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..lib.args import flags, option
from .main import COMMANDS

# A value is completed by the last flag before it, behind which several may stand; where that has no choices, as a file.
_SCRIPT = """\
_fluxmoe() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" said="${{COMP_WORDS[*]:1:COMP_CWORD-1}} " flag="" words="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [[ $word == --* ]] && flag=$word
    done
    case "$said" in
{commands}
    esac
    [[ $current != -* ]] && case "$said$flag" in
{choices}
        *--*) words="" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fluxmoe fluxmoe
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shell: str = option("whose script", choices=("bash", "zsh"), positional=True)


def script() -> str:
    """Of bash. The longer names first: the pattern of `versus` also fits `versus walls`."""
    said = {"": [*dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)]}
    choices: dict[str, Sequence[str]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        if second:
            said.setdefault(first, []).append(second)
        found = flags(importlib.import_module(f"fluxmoe.experiments.{COMMANDS[name][0]}").Arguments)
        said[name] = [*said.get(name, []), *found, "--config", "--help"]
        choices |= {f'"{name} "*{flag}': values for flag, values in found.items() if values}
    by_command = {f'"{name} "*' if name else '" "': said[name] for name in sorted(said, reverse=True)}
    return _SCRIPT.format(commands=_cases(by_command), choices=_cases(choices))


def _cases(words: Mapping[str, Sequence[str]]) -> str:
    """What would have to be quoted is left out."""
    plain = {case: " ".join(word for word in each if " " not in word) for case, each in words.items()}
    return "\n".join(f'        {case}) words="{each}" ;;' for case, each in plain.items())


def run(args: Arguments) -> None:
    print(("autoload -U +X bashcompinit && bashcompinit\n" if args.shell == "zsh" else "") + script(), end="")
