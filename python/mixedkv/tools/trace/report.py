"""What the commands print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._commands import printable
from .compare import Comparison
from .format import ROLES, RecordedStep, Trace, tensor_name
from .layout import statistics
from .metrics import Difference
from .reference import TraceComparison
from .results import StepResult, Verification
from .stored import as_float32, format_of, typed

_MOST_FAILURES = 12
_WIDTH = 150
"""Columns of print where there is no terminal to ask."""


def make_console(*, stderr: bool = False) -> Console:
    """Give a console on which tables are not squeezed when the output goes into a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 1)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _figures(found: Difference) -> list[str]:
    """Give the columns of `_FIGURES`."""
    return [
        f"{found.max:.2e}",
        f"{found.mean:.2e}",
        f"{found.nmse:.2e}",
        f"{found.cosine:.9f}",
        f"{found.relative:.2e}",
    ]


_FIGURES = ("max", "mean", "NMSE", "cosine", "relative")


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is, whatever it holds."""
    console.print(text, style=style, markup=False, highlight=False)


def _mark(passed: bool) -> Text:
    return Text("ok", "green") if passed else Text("FAIL", "bold red")


def print_recorded(console: Console, step: RecordedStep) -> None:
    """Print a line for each tensor of a recorded step."""
    for role in ROLES:
        array = step.tensors.get(role)
        if array is None:
            continue
        found = statistics(array)
        shape, kind = list(typed(array).shape), format_of(array).name
        console.print(
            f"{tensor_name(role, step.layer, step.step):<24} {kind:<8} {shape!s:<20} "
            f"mean {found.mean: .3e}  std {found.std:.3e}  min {found.min: .3e}  "
            f"max {found.max: .3e}",
            highlight=False,
            soft_wrap=True,
        )


def print_contents(console: Console, trace: Trace) -> None:
    """Print what a trace says of itself."""
    header = trace.header
    layers = sorted({step.layer for step in trace.steps})
    steps = sorted({step.step for step in trace.steps})
    tensors = sum(len(step.tensors) for step in trace.steps)
    rows = [("trace", printable(trace.path))]
    if header is None:
        rows.append(("roles", "not in the file: taken by order"))
    else:
        rows += [
            ("model", printable(header.model)),
            ("engine", printable(f"{header.engine} ({header.engine_version})")),
            ("cache", header.cache),
            ("tokens", f"{len(header.tokens):,}"),
        ]
    info = trace.steps[0].info
    rows += [
        ("layers", f"{len(layers)}: {layers[0]} to {layers[-1]}"),
        ("steps", f"{len(steps)}: {steps[0]} to {steps[-1]}"),
        ("tensors", f"{tensors:,}"),
        ("heads", f"{info.num_qo_heads} query, {info.num_kv_heads} kv; head_dim {info.head_dim}"),
        ("sm_scale", f"{info.sm_scale:.6g}"),
    ]
    console.print(_grid(rows))


def print_shapes(console: Console, trace: Trace) -> None:
    """Print every tensor's role, type and shape."""
    table = Table("tensor", "role", "type", "shape (ggml order)", box=box.SIMPLE_HEAD)
    for step in trace.steps:
        for role, tensor in step.tensors.items():
            table.add_row(
                Text(printable(tensor.name)), role, tensor.type_name, Text(str(list(tensor.ne)))
            )
    console.print(table)


def print_data(console: Console, trace: Trace, count: int) -> None:
    """Print the first values of every tensor."""
    for step in trace.steps:
        for tensor in step.tensors.values():
            flat = tensor.load()
            rows = flat.reshape(-1, flat.shape[-1])
            enough = -(-count // max(1, tensor.ne[0]))
            values = as_float32(rows[:enough]).ravel()[:count]
            words = " ".join(f"{value:.6g}" for value in values.tolist())
            console.print(
                f"{printable(tensor.name)}: {words}", highlight=False, markup=False, soft_wrap=True
            )


def print_verification(console: Console, result: Verification) -> None:
    """Print the table of steps, the summary and the verdict."""
    costs = [step.cost.relative for step in result.steps if step.cost is not None]
    table = _table(
        *("step", "layer", "queries", "keys", *_FIGURES, "worst head", "grade", "own op"),
        *(["cost"] if costs else []),
        "",
        title="Recorded output against PyTorch f32",
    )
    for step in result.steps:
        own = max(step.isas.values(), key=lambda one: one.relative, default=None)
        table.add_row(
            str(step.step),
            str(step.layer),
            str(step.n),
            f"{step.kv_cold}+{step.kv_hot}" if step.kv_cold else str(step.kv_hot),
            *_figures(step.torch_f32),
            f"{step.worst.head_relative:.1e} h{step.worst.head}",
            step.torch_f32.grade,
            f"{own.relative:.2e}" if own is not None else "-",
            *([f"{step.cost.relative:.2e}" if step.cost else "-"] if costs else []),
            _mark(step.passed),
        )
    console.print(table)

    failing = [step for step in result.steps if not step.passed]
    for step in failing[:_MOST_FAILURES]:
        for failure in step.failures:
            _say(console, f"step {step.step}, layer {step.layer}: {failure}", "red")
        for hint in step.hints:
            _say(console, f"    {hint}", "yellow")
    if len(failing) > _MOST_FAILURES:
        console.print(f"... and {len(failing) - _MOST_FAILURES} more steps", style="red")
    for failure in result.failures:
        _say(console, failure, "red")
    console.print(_grid(_summary(result, costs)))
    for remark in result.remarks:
        _say(console, f"note: {remark}", "yellow")
    why = f"{len(result.steps) - len(failing)} of {len(result.steps)} steps in tolerance"
    if result.failures:
        why += ", but the trace as a whole is not sound"
    if result.remarks:
        notes = "the note" if len(result.remarks) == 1 else f"the {len(result.remarks)} notes"
        why += f"; {notes} above: what the verdict does not cover"
    print_verdict(console, result.passed, why)


def _summary(result: Verification, costs: list[float]) -> Iterator[tuple[str, str]]:
    """Give what is worst over all steps."""
    of: list[tuple[str, Callable[[StepResult], Difference]]] = [
        ("PyTorch f32, worst step", lambda step: step.torch_f32),
        ("PyTorch f64, worst step", lambda step: step.torch_f64),
        ("PyTorch f32 against f64", lambda step: step.torch_own),
    ]
    for name, get in of:
        found = max(map(get, result.steps), key=lambda one: one.relative)
        yield name, f"{found.relative:.2e} relative, {found.max:.2e} at most"
    head = max(result.steps, key=lambda step: step.worst.head_relative)
    row = max(result.steps, key=lambda step: step.worst.row_relative)
    yield (
        "worst head",
        f"{head.worst.head_relative:.2e} relative: head {head.worst.head} in step {head.step} of "
        f"layer {head.layer}",
    )
    yield (
        "worst head of a query",
        f"{row.worst.row_relative:.2e} relative: query {row.worst.row_query}, head "
        f"{row.worst.row_head} in step {row.step} of layer {row.layer}",
    )
    for isa in result.steps[0].isas:
        found = max((step.isas[isa] for step in result.steps), key=lambda one: one.relative)
        yield f"own op on {isa}", f"{found.relative:.2e} relative, {found.max:.2e} at most"
    if result.rows_followed:
        yield "rows followed", f"{result.rows_followed:,} from step to step"
    if costs:
        yield (
            "cost of quantisation",
            f"{max(costs):.2e} relative in the worst step, {float(np.median(costs)):.2e} in the "
            "median one (against the keys and values while hot; no part of the verdict)",
        )
    elif any(step.quantised for step in result.steps):
        yield "cost of quantisation", "not known: the trace does not hold what was quantised"


def print_trace_comparison(console: Console, result: TraceComparison) -> None:
    """Print two traces beside one another."""
    table = _table(
        *("step", "layer", "tensor", *_FIGURES, "grade"), title="Against the reference trace"
    )
    for layer, step, role, found in result.steps:
        table.add_row(str(step), str(layer), role, *_figures(found), found.grade)
    console.print(table)
    for failure in result.failures[:_MOST_FAILURES]:
        _say(console, failure, "red")
    print_verdict(console, result.passed, f"{len(result.failures)} outputs differ or are missing")


def print_comparison(console: Console, result: Comparison, elements: int) -> None:
    """Print the three ways beside one another."""
    rows = result.elements(elements)
    if rows:
        names = ("", "whole", "segmented", "PyTorch", *("whole - segm.", "whole - torch"))
        table = _table(*names, "segm. - torch", title=f"First {len(rows)} elements")
        for index, row in enumerate(rows):
            table.add_row(
                str(index), *(f"{x: .7f}" for x in row[:3]), *(f"{x: .2e}" for x in row[3:])
            )
        console.print(table)
    table = _table("", *_FIGURES, "above tolerance", "", title="All elements")
    for pair in result.pairs:
        table.add_row(
            f"{pair.a}, {pair.b}",
            *_figures(pair.found),
            f"{pair.above} of {pair.found.elements} > {pair.tolerance_abs:.0e}",
            _mark(pair.passed),
        )
    console.print(table)
    console.print(
        f"M {result.M[0]:.6g} to {result.M[1]:.6g}, S {result.S[0]:.6g} to {result.S[1]:.6g}",
        highlight=False,
    )
    passed = sum(pair.passed for pair in result.pairs)
    print_verdict(console, result.passed, f"{passed} of {len(result.pairs)} pairs in tolerance")


def print_verdict(console: Console, passed: bool, why: str) -> None:
    """Print PASS or FAIL, and why."""
    word = Text("PASS", "bold green") if passed else Text("FAIL", "bold red")
    console.print(word + Text(f": {why}", "default"))
