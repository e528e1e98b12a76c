"""What tells how far a tool is."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from mixedkv.tools.progress import Bars
from rich.console import Console


def shown(*, terminal: bool = True, phases: int | None = None, keep: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Bars(console, phases=phases, keep=keep) as bars:
        bars.phase("reading [/x]", 40)
        bars.at(10, 40)
        bars.phase("fetching")
        bars.at(3_000_000, 90_000_000)
        bars.at(0.5, 1, "checking [b]")
    return out.getvalue()


@pytest.mark.parametrize("phases", [None, 2])
def test_bars_say_what_is_done(phases: int | None) -> None:
    said = shown(phases=phases)
    for words in ("reading [/x]", "10/40", "3.0/90.0 MB", "checking [b]"):
        assert words in said, words
    assert ("1/2" in said) == (phases is not None)


def test_bars_that_stay_end_full() -> None:
    last = shown(keep=True).rpartition("reading")[2]
    assert "40/40" in last
    assert "1/1" in last


def test_bars_are_silent_where_nobody_watches() -> None:
    assert shown(terminal=False) == ""
