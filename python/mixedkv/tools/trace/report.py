"""What the commands print."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._commands import printable
from .compare import Comparison
from .format import ROLES, RecordedStep, Trace, tensor_name
from .layout import as_float32, statistics
from .metrics import Difference
from .reference import TraceComparison
from .results import StepResult, Verification

_MOST_FAILURES = 12
_WIDTH = 150
"""Columns of print where there is no terminal to ask."""


_STEP_COLUMNS = (
    "step",
    "layer",
    "queries",
    "keys",
    "max",
    "mean",
    "NMSE",
    "cosine",
    "relative",
    "worst head",
)
_ELEMENT_COLUMNS = (
    "",
    "whole",
    "segmented",
    "PyTorch",
    "whole - segm.",
    "whole - torch",
    "segm. - torch",
)


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


def print_recorded(console: Console, step: RecordedStep) -> None:
    """Print a line for each tensor of a recorded step."""
    for role in ROLES:
        array = step.tensors.get(role)
        if array is None:
            continue
        found = statistics(array)
        kind = "q4_0" if array.dtype == np.uint8 else array.dtype.name
        shape = list(array.shape)
        if kind == "q4_0":
            shape[-1] = shape[-1] // 18 * 32
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
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
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
        (
            "heads",
            f"{info.num_qo_heads} query, {info.num_kv_heads} kv; head_dim {info.head_dim}",
        ),
        ("sm_scale", f"{info.sm_scale:.6g}"),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


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
    has_cost = any(step.cost is not None for step in result.steps)
    table = _table(*_STEP_COLUMNS, title="Recorded output against PyTorch f32")
    table.add_column("grade")
    table.add_column("own op", justify="right")
    if has_cost:
        table.add_column("cost of Q4_0", justify="right")
    table.add_column("")
    for step in result.steps:
        found = step.torch_f32
        worst = max(step.isas.values(), key=lambda one: one.relative, default=None)
        keys = f"{step.kv_cold}+{step.kv_hot}" if step.kv_cold else str(step.kv_hot)
        table.add_row(
            str(step.step),
            str(step.layer),
            str(step.n),
            keys,
            f"{found.max:.2e}",
            f"{found.mean:.2e}",
            f"{found.nmse:.2e}",
            f"{found.cosine:.9f}",
            f"{found.relative:.2e}",
            f"{step.worst.head_relative:.1e} h{step.worst.head}",
            found.grade,
            f"{worst.relative:.2e}" if worst is not None else "-",
            *([f"{step.cost.relative:.2e}" if step.cost else "-"] if has_cost else []),
            Text("ok", "green") if step.passed else Text("FAIL", "bold red"),
        )
    console.print(table)

    failing = [step for step in result.steps if not step.passed]
    for step in failing[:_MOST_FAILURES]:
        _print_failure(console, step)
    if len(failing) > _MOST_FAILURES:
        console.print(f"... and {len(failing) - _MOST_FAILURES} more steps", style="red")
    for failure in result.failures:
        console.print(failure, style="red", markup=False, highlight=False)

    summary = Table(show_header=False, box=None, pad_edge=False)
    summary.add_column(style="bold")

    def line(name: str, of: Callable[[StepResult], Difference | None]) -> None:
        found = result.worst(of)
        if found is not None:
            summary.add_row(name, f"{found.relative:.2e} relative, {found.max:.2e} at most")

    line("PyTorch f32, worst step", lambda step: step.torch_f32)
    line("PyTorch f64, worst step", lambda step: step.torch_f64)
    line("PyTorch f32 against f64", lambda step: step.torch_own)
    head = max(result.steps, key=lambda step: step.worst.head_relative)
    row = max(result.steps, key=lambda step: step.worst.row_relative)
    summary.add_row(
        "worst head",
        f"{head.worst.head_relative:.2e} relative: head {head.worst.head} in step {head.step} of "
        f"layer {head.layer}",
    )
    summary.add_row(
        "worst head of a query",
        f"{row.worst.row_relative:.2e} relative: query {row.worst.row_query}, head "
        f"{row.worst.row_head} in step {row.step} of layer {row.layer}",
    )
    for isa in result.steps[0].isas:
        line(f"own op on {isa}", lambda step, isa=isa: step.isas[isa])  # type: ignore[misc]
    if result.rows_followed:
        summary.add_row("rows followed", f"{result.rows_followed:,} from step to step")
    if has_cost:
        costs = [step.cost.relative for step in result.steps if step.cost is not None]
        summary.add_row(
            "cost of quantisation",
            f"{max(costs):.2e} relative in the worst step, {float(np.median(costs)):.2e} in the "
            "median one (against the keys and values while hot; no part of the verdict)",
        )
    elif any(step.quantised for step in result.steps):
        summary.add_row(
            "cost of quantisation", "not known: the trace does not hold what was quantised"
        )
    console.print(summary)
    for remark in result.remarks:
        console.print(f"note: {remark}", style="yellow", markup=False, highlight=False)
    passed = len(result.steps) - len(failing)
    why = f"{passed} of {len(result.steps)} steps in tolerance"
    if result.failures:
        why += ", but the trace as a whole is not sound"
    if result.remarks:
        notes = "the note" if len(result.remarks) == 1 else f"the {len(result.remarks)} notes"
        why += f"; {notes} above: what the verdict does not cover"
    _print_verdict(console, result.passed, why)


def _print_failure(console: Console, step: StepResult) -> None:
    for failure in step.failures:
        console.print(
            f"step {step.step}, layer {step.layer}: {failure}",
            style="red",
            markup=False,
            highlight=False,
        )
    for hint in step.hints:
        console.print(f"    {hint}", style="yellow", markup=False, highlight=False)


def print_trace_comparison(console: Console, result: TraceComparison) -> None:
    """Print two traces beside one another."""
    table = _table(
        "step",
        "layer",
        "tensor",
        "max",
        "mean",
        "NMSE",
        "cosine",
        "relative",
        title="Against the reference trace",
    )
    table.add_column("grade")
    for layer, step, role, found in result.steps:
        table.add_row(
            str(step),
            str(layer),
            role,
            f"{found.max:.2e}",
            f"{found.mean:.2e}",
            f"{found.nmse:.2e}",
            f"{found.cosine:.9f}",
            f"{found.relative:.2e}",
            found.grade,
        )
    console.print(table)
    for failure in result.failures[:_MOST_FAILURES]:
        console.print(failure, style="red", markup=False, highlight=False)
    _print_verdict(console, result.passed, f"{len(result.failures)} outputs differ or are missing")


def print_comparison(console: Console, result: Comparison, elements: int) -> None:
    """Print the three ways beside one another."""
    rows = result.elements(elements)
    if rows:
        table = _table(*_ELEMENT_COLUMNS, title=f"First {len(rows)} elements")
        for index, row in enumerate(rows):
            table.add_row(
                str(index), *(f"{x: .7f}" for x in row[:3]), *(f"{x: .2e}" for x in row[3:])
            )
        console.print(table)
    table = _table(
        "", "max", "mean", "relative", "NMSE", "cosine", "above tolerance", title="All elements"
    )
    table.add_column("")
    for pair in result.pairs:
        found = pair.found
        table.add_row(
            f"{pair.a}, {pair.b}",
            f"{found.max:.2e}",
            f"{found.mean:.2e}",
            f"{found.relative:.2e}",
            f"{found.nmse:.2e}",
            f"{found.cosine:.9f}",
            f"{pair.above} of {found.elements} > {pair.tolerance_abs:.0e}",
            Text("ok", "green") if pair.passed else Text("FAIL", "bold red"),
        )
    console.print(table)
    console.print(
        f"M {result.M[0]:.6g} to {result.M[1]:.6g}, S {result.S[0]:.6g} to {result.S[1]:.6g}",
        highlight=False,
    )
    passed = sum(pair.passed for pair in result.pairs)
    _print_verdict(console, result.passed, f"{passed} of {len(result.pairs)} pairs in tolerance")


def print_overall(console: Console, passed: bool) -> None:
    """Print the verdict over a trace by itself and against its reference."""
    _print_verdict(console, passed, "by itself and against the reference")


def _print_verdict(console: Console, passed: bool, why: str) -> None:
    word = Text("PASS", "bold green") if passed else Text("FAIL", "bold red")
    console.print(word + Text(f": {why}", "default"))
