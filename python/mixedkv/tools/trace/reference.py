"""Two traces of the same steps, beside one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .arithmetic import magnitude, problem_of, sees_quantised
from .format import Trace
from .gguf_file import TraceError
from .metrics import Difference, difference, row_errors
from .results import Tolerance
from .stored import as_float32


@dataclass(frozen=True)
class TraceComparison:
    """Two traces of the same steps: the recorded outputs against one another.

    Attributes
    ----------
    steps
        (layer, step, role, difference) for kqv_out, and for the other tensors whose shapes agree.
    """

    steps: list[tuple[int, int, str, Difference]]
    failures: list[str]

    @property
    def passed(self) -> bool:
        """Whether all outputs agree within the tolerance."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        return {
            "passed": self.passed,
            "failures": self.failures,
            "steps": [
                {"layer": layer, "step": step, "role": role, **vars(found)}
                for layer, step, role, found in self.steps
            ],
        }


def compare_traces(
    trace: Trace,
    reference: Trace,
    tolerance: Tolerance | None = None,
    layers: Iterable[int] | None = None,
) -> TraceComparison:
    """Compare the outputs of two traces step by step, and what else has the same shape.

    Only the outputs decide: with another cache, keys may rightly differ. A step that one of them
    lacks is a failure.

    Parameters
    ----------
    layers
        Only these; None: all that one of them has.

    Raises
    ------
    TraceError
        They have no step in common.
    """
    tolerance = tolerance or Tolerance()
    wanted = None if layers is None else set(layers)
    steps, theirs = (
        [step for step in one.steps if wanted is None or step.layer in wanted]
        for one in (trace, reference)
    )
    others = {(step.step, step.layer): step for step in theirs}
    found: list[tuple[int, int, str, Difference]] = []
    failures: list[str] = []
    shared = 0
    for step in steps:
        other = others.pop((step.step, step.layer), None)
        where = f"step {step.step} of layer {step.layer}"
        if other is None:
            failures.append(f"{where}: the reference lacks it")
            continue
        shared += 1
        a, b = step.load(), other.load()
        if a.out.shape != b.out.shape:
            failures.append(f"{where}: outputs have shapes {a.out.shape} and {b.out.shape}")
            continue
        result = difference(a.out, b.out)
        found.append((step.layer, step.step, "kqv_out", result))
        quantised = sees_quantised(a) or sees_quantised(b)
        rows = row_errors(a.out, b.out, magnitude(problem_of(b, other.info)))
        failures += [
            f"{where}: {words}"
            for words in tolerance.judge("the outputs of both", result, quantised, rows)
        ]
        for role, mine, its in (("q", a.q, b.q), ("k", a.k, b.k), ("v", a.v, b.v)):
            mine, its = as_float32(mine), as_float32(its)
            if mine.shape == its.shape:
                found.append((step.layer, step.step, role, difference(mine, its)))
    if not shared:
        raise TraceError(f"{trace.path.name} and {reference.path.name} share no step of a layer")
    failures += [
        f"step {step} of layer {layer}: only the reference has it" for step, layer in others
    ]
    return TraceComparison(found, failures)
