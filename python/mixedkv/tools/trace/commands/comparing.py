"""The command ``mixedkv compare``."""

from __future__ import annotations

import re
from typing import Annotated

import typer

import mixedkv as mkv

from ..._commands import one_line, print_json, set_threads, stop
from ...options import AsJson, Debug, KType, Seed, Threads, VType, tolerance, watch_layouts


@one_line("trace")
def compare(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 2,
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
            "with q4_0."
        ),
    ] = None,
    tolerance_abs: Annotated[
        float | None,
        tolerance(
            "Largest difference of an element. Default: 1e-5, or 1e-3 with q4_0, times the largest "
            "value where that is above 1."
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

    try:
        settings = comparing.Settings(
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qo_len=qo_len,
            kv_len=kv_len,
            segments=segments,
            k_type=k_type,
            v_type=v_type,
            causal=causal,
            seed=seed,
            tolerance_abs=tolerance_abs,
            tolerance_rel=tolerance_rel,
        )
    except ValueError as error:
        stop(_in_options(str(error)))
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


_OPTIONS = {
    "num_qo_heads": "--heads",
    "num_kv_heads": "--kv-heads",
    "head_dim": "--head-dim",
    "qo_len": "--qo-len",
    "kv_len": "--kv-len",
    "segments": "--segments",
    "k_type": "-ctk",
    "v_type": "-ctv",
    "tolerance_abs": "--tolerance-abs",
    "tolerance_rel": "--tolerance-rel",
}


def _in_options(message: str) -> str:
    """Put the options that were given in place of the settings' names."""
    return re.sub(r"\b[a-z_]+\b", lambda match: _OPTIONS.get(match[0], match[0]), message)
