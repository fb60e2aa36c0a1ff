"""What tests of commands share."""

from __future__ import annotations

import pytest
from fluxmoe.experiments.commands import main


@pytest.fixture
def error_of(capsys):
    """The one line that a command line's error is."""

    def run(*argv) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main.main([str(part) for part in argv])
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
