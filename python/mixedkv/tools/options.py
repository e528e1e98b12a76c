"""Options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

import mixedkv as mkv
from mixedkv.cache import presets

from ._commands import MOST_SEED, finite

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Log shape, strides, mean and std after each permute or conversion."
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Where fetched models are kept. Default: user cache."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        readable=True,
        help="A file that holds the prompt. Default: prose out of Python's language reference.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", min=1, max=1024, help="Threads, of torch and of mixedkv."),
]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the random numbers.")]
Sample = Annotated[
    bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(presets.NAMES)}: options of a mixed cache, which those given beside "
        "change."
    ),
]
HotSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of the hot tier of a mixed cache. Default: the preset's, or 128."
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens moved at once. Default: the preset's, or 256."),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(min=0, help="First tokens, which stay hot. Default: the preset's, or 0."),
]
HotKeep = Annotated[
    int | None,
    typer.Option(min=0, help="Newest tokens, which stay hot. Default: the preset's, or 0."),
]
Rotate = Annotated[
    bool | None,
    typer.Option("--rotate/--no-rotate", help="Rotated rows. Default: the preset's, or no."),
]
CenterKeys = Annotated[
    bool | None,
    typer.Option(
        "--center-keys/--no-center-keys",
        help="Centered keys in the cold tier. Default: the preset's, or no.",
    ),
]
_TYPES = ", ".join(mkv.formats.available())
KType = Annotated[
    str, typer.Option("-ctk", "--cache-type-k", "--k-type", help=f"Type of keys: {_TYPES}.")
]
VType = Annotated[
    str, typer.Option("-ctv", "--cache-type-v", "--v-type", help=f"Type of values: {_TYPES}.")
]
ColdKType = Annotated[
    str | None,
    typer.Option(
        help="Type of the cold keys of a mixed cache, any of the same. Default: the preset's, or "
        "q4_0."
    ),
]
ColdVType = Annotated[str | None, typer.Option(help="Type of its cold values, likewise.")]


def tolerance(text: str) -> object:
    """Give the option of a tolerance, which `text` explains."""
    return typer.Option(min=0.0, callback=finite, help=text)


def watch_layouts(wanted: bool) -> None:
    """Let the layout log speak."""
    if wanted:
        from .trace import layout

        layout.log_to_stderr()


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Read 'all' (None) or '0,3-5'."""
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"must be layers such as 0 or 0,5,29 or 3-7, or all; got {text!r}",
                param_hint="--layer",
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))
