"""The command ``mixedkv verify``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import mixedkv as mkv

from ..._commands import (
    check_plot,
    finite,
    naming,
    one_line,
    print_json,
    printable,
    set_threads,
)
from ...options import AsJson, Debug, Threads, parse_layers, tolerance, watch_layouts
from ...progress import Bars
from ..gguf_file import TraceError


@one_line("trace", TraceError)
def verify(
    file: Annotated[Path, typer.Option("-i", "--input", help="The trace.")],
    shapes: Annotated[bool, typer.Option("--shapes", help="List the tensors.")] = False,
    show_data: Annotated[
        int, typer.Option(min=0, max=100_000, help="Print the first N values of each tensor.")
    ] = 0,
    layer: Annotated[str, typer.Option(help="Layers to look at, as in trace; or all.")] = "all",
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Instruction sets for mixedkv's own op; may be repeated. Default: all."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Compare the outputs with those of this trace, too.")
    ] = None,
    tolerance_rel: Annotated[
        float | None,
        tolerance(
            "Largest norm of a step's difference over the norm. Default: 2e-5, or 1e-3 where keys "
            "or values in blocks, such as Q4_0, take part."
        ),
    ] = None,
    tolerance_abs: Annotated[
        float | None,
        tolerance(
            "Largest difference of an element. Default: 10 times the relative tolerance times the "
            "step's largest value."
        ),
    ] = None,
    sm_scale: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="Scale of the logits, for a trace without roles. Default: head_dim^-0.5",
        ),
    ] = None,
    threads: Threads = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error and entropy into this file (.png, .svg, .pdf).")
    ] = None,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Recompute a trace with PyTorch and with mixedkv's own op, and judge it.

    Exit status 0: all in tolerance; 1: something is not; 2: the file can't be read as a trace.
    """
    layers = parse_layers(layer)
    check_plot(plot, "trace")
    for name in isa or ():
        if name not in mkv.isa.available():
            raise typer.BadParameter(
                f"must be one of {', '.join(mkv.isa.available())}, got {name!r}", param_hint="--isa"
            )
    watch_layouts(debug)
    set_threads(threads)

    from .. import read_trace, report
    from .. import verify as verifying
    from ..room import check_room

    console = report.make_console(stderr=as_json)
    within = verifying.Tolerance(tolerance_rel, tolerance_abs)
    other = None
    if reference is not None:
        other = read_trace(reference)
        check_room(other, layers)
    with _recomputing(file):
        read = read_trace(file, sm_scale=sm_scale)
        check_room(read, layers)
        if not as_json:
            report.print_contents(console, read)
            if shapes:
                report.print_shapes(console, read)
            if show_data:
                report.print_data(console, read, show_data)
        with Bars(Console(stderr=True)) as bars:
            result = verifying.verify(
                read,
                tolerance=within,
                layers=layers,
                isas=isa,
                entropy=plot is not None,
                progress=bars,
            )
        compared = None
        if other is not None:
            compared = verifying.compare_traces(read, other, within, layers)
    passed = result.passed and (compared is None or compared.passed)
    if plot is not None:
        from ..plot import plot_verification

        with naming(plot):
            plot_verification(result, plot, passed=passed)
    if as_json:
        words = result.as_dict()
        if compared is not None:
            words["by_itself"] = words["passed"]
            words["passed"] = passed
            words["reference"] = compared.as_dict()
        print_json(words)
    else:
        report.print_verification(console, result)
        if compared is not None:
            report.print_trace_comparison(console, compared)
            report.print_verdict(console, passed, "by itself and against the reference")
        if plot is not None:
            console.print(f"plot: {printable(plot)}", highlight=False, markup=False)
    if not passed:
        raise typer.Exit(1)


@contextmanager
def _recomputing(file: Path) -> Iterator[None]:
    """Say of which file arithmetic's own words are, which know of none."""
    try:
        yield
    except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
        why = str(error) or type(error).__name__
        raise TraceError(f"{file}: can't be recomputed: {why}") from error
