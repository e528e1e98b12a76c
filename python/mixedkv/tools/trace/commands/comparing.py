"""The command ``mixedkv compare``."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer

import mixedkv as mkv

from ..._commands import one_line, print_json, set_threads, stop
from ...options import AsJson, Debug, KType, Seed, Threads, VType, tolerance, watch_layouts


@one_line("trace")
def compare(
    context: typer.Context,
    num_qo_heads: Annotated[int, typer.Option("--heads", min=1, help="Query heads.")] = 8,
    num_kv_heads: Annotated[
        int, typer.Option("--kv-heads", min=1, help="Key and value heads.")
    ] = 2,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    qo_len: Annotated[int, typer.Option(min=1, help="Queries.")] = 16,
    kv_len: Annotated[int, typer.Option(min=1, help="Keys.")] = 512,
    segments: Annotated[int, typer.Option(min=1, help="Runs of keys of the segmented way.")] = 4,
    k_type: KType = "f16",
    v_type: VType = "f16",
    causal: Annotated[bool, typer.Option(help="Hide later keys.")] = True,
    seed: Seed = 42,
    elements: Annotated[int, typer.Option(min=0, help="Elements to print.")] = 128,
    tolerance_rel: Annotated[
        float | None,
        tolerance(
            "Largest norm of the difference over the norm. Default: 1e-5 against PyTorch, 1e-3 "
            "with keys or values in blocks, such as q4_0."
        ),
    ] = None,
    tolerance_abs: Annotated[
        float | None,
        tolerance(
            "Largest difference of an element. Default: 1e-5, or 1e-3 with blocks, times the "
            "largest value where that is above 1."
        ),
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set.")] = None,
    threads: Threads = None,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Compare the op with itself in segments and with PyTorch, on random numbers.

    Exit status 1: one of the three pairs is out of tolerance.
    """
    watch_layouts(debug)
    set_threads(threads)

    from .. import compare as comparing
    from .. import report
    from ..arithmetic import isa_selected

    names = [field.name for field in dataclasses.fields(comparing.Settings)]
    try:
        settings = comparing.Settings(**{name: context.params[name] for name in names})
    except ValueError as error:
        # The settings speak of themselves; here they are options.
        options = {one.name: one.opts[0] for one in context.command.params}
        stop(re.sub(r"\b[a-z_]+\b", lambda word: options.get(word[0], word[0]), str(error)))
    with isa_selected(isa or mkv.isa.active()):
        result = comparing.compare(settings)
        words = result.as_dict()
    if as_json:
        words["elements"] = result.elements(elements)
        print_json(words)
    else:
        report.print_comparison(report.make_console(), result, elements)
    if not result.passed:
        raise typer.Exit(1)
