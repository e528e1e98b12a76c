"""What all commands share: how they end where they can't go on, and what they check beforehand."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

import mixedkv as mkv

PICTURES = (".png", ".svg", ".pdf")
MOST_SEED = 2**63 - 1
"""What torch takes."""

_MOST_CHARACTERS = 400
_EXTRAS = {"llama_cpp": "llama"}
"""Modules that come with another extra than most of what a command needs."""

logger = logging.getLogger("mixedkv.tools.commands")


def printable(text: object, most: int = _MOST_CHARACTERS) -> str:
    """Give one line that any terminal and any picture can show: no control characters, and cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= most else line[: most - 4] + " ..."


def stop(message: object) -> NoReturn:
    """End with status 2 and one line on stderr."""
    typer.echo(f"mixedkv: {printable(message)}", err=True)
    raise typer.Exit(2)


def need(name: str | None, extra: str) -> NoReturn:
    """End because a module is not installed; say which extra brings it."""
    stop(f"this needs {name}: pip install 'mixedkv[{extra}]'")


def environment_problems() -> list[str]:
    """Say what is wrong with the environment variables that mixedkv reads, in a line each."""
    problems = []
    for ask in (mkv.isa.active, mkv.get_num_threads):  # MIXEDKV_ISA and MIXEDKV_NUM_THREADS
        try:
            ask()
        except ValueError as error:
            problems.append(str(error))
    return problems


@contextmanager
def one_line(extra: str, *expected: type[Exception]) -> Iterator[None]:
    """End a command with status 2 and one line, whatever it can't do; also a decorator.

    What is wrong with the environment is told before the command begins. Files and options that
    nobody vouches for may ask for more than arithmetic, memory or the system can do; the traceback
    goes to the log: ``MIXEDKV_DEBUG=1`` shows it.

    Parameters
    ----------
    extra
        Of mixedkv: brings the modules that the command needs.
    expected
        Errors of the command's own, beside those that anything may raise.
    """
    for problem in environment_problems():
        stop(problem)
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        # The command's own end, or the reader's of its output: no errors of the command.
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "mixedkv"):
            raise
        need(error.name, _EXTRAS.get(missing, extra))
    except MemoryError as error:
        _log(error)
        stop(str(error) or "there is not enough memory")
    except OSError as error:
        _log(error)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        stop(": ".join([" -> ".join(names), str(error.strerror)]) if names else error)
    except (ValueError, OverflowError, RuntimeError) as error:
        _log(error)
        stop(str(error) or type(error).__name__)
    except expected as error:
        _log(error)
        stop(error)


def _log(error: Exception) -> None:
    logger.debug("the command ends with status 2", exc_info=error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what the system says name the file asked for: not none, nor a temporary one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_output(path: Path, option: str) -> None:
    """Refuse a file that can't be written, before minutes of computing; leaves nothing behind."""
    try:
        if path.is_dir():
            stop(f"{option}: {printable(path, 200)} is a directory")
        if not path.resolve().parent.is_dir():
            stop(f"{option}: {printable(path.parent, 200)} is not a directory")
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY))
        elif not path.exists():
            with tempfile.TemporaryFile(dir=path.resolve().parent):
                pass
    except OSError as error:
        stop(f"{option}: {printable(path, 200)} can't be written: {error.strerror or error}")


def check_plot(path: Path | None, extra: str) -> None:
    """Refuse a picture's path that would fail later; None passes."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        need("matplotlib", extra)
    if path.suffix.lower() not in PICTURES:
        stop(f"--plot: the file must end in {', '.join(PICTURES)}, got {str(path)!r}")
    check_output(path, "--plot")


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity; a callback of options."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, got {value}")
    return value


def quiet_transformers() -> None:
    """Leave the screen to a command's own words."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def set_threads(threads: int | None) -> None:
    """Set mixedkv's threads and, where it is installed, PyTorch's; None changes nothing."""
    if threads is None:
        return
    mkv.set_num_threads(threads)
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(threads)


def print_json(words: dict[str, Any]) -> None:
    """Print one JSON object on one line; NaN and infinity, for which JSON has no word, as text."""
    typer.echo(json.dumps(_plain(words), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
