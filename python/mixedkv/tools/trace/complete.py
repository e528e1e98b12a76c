"""Whether a trace holds what it says that it holds: every step of every layer, and no more."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from .format import Trace

_MOST_NAMED = 4


def incomplete(trace: Trace, layers: Iterable[int] | None = None) -> list[str]:
    """Say in words what a trace lacks, and which tensors nothing tells the use of.

    Parameters
    ----------
    layers
        Only these; None: all that the trace says it has.
    """
    header = trace.header
    held: dict[int, set[int]] = {}
    for step in trace.steps:
        held.setdefault(step.layer, set()).add(step.step)
    found = set().union(*held.values())
    failures = []
    wanted: Iterable[int]
    if header is not None and header.step_tokens:
        count = len(header.step_tokens)
        wanted, why = range(1, count + 1), f"kqv_trace.step_tokens tells of {count} steps"
    elif header is not None and len(found) < max(found):
        # Steps count from 1; the first that lacks is enough to say, however far the last is.
        gap = next(step for step in range(1, len(found) + 2) if step not in found)
        wanted = sorted(found | {gap})
        why = f"the last step is {max(found)}"
    else:
        wanted, why = sorted(found), "other layers have it"
    described = set(held) if header is None else set(header.layers)
    asked = described if layers is None else described & set(layers)
    for layer in sorted(asked):
        steps = held.get(layer, set())
        lacking = list(itertools.islice((s for s in wanted if s not in steps), _MOST_NAMED + 1))
        if not steps:
            failures.append(f"layer {layer} is in kqv_trace.layers, and no step of it is there")
        elif lacking:
            named = ", ".join(map(str, lacking[:_MOST_NAMED]))
            more = ", ..." if len(lacking) > _MOST_NAMED else ""
            word = "step" if len(lacking) == 1 else "steps"
            failures.append(f"layer {layer} lacks {word} {named}{more}: {why}")
    if trace.unnamed:
        named = ", ".join(trace.unnamed[:_MOST_NAMED])
        more = ", ..." if len(trace.unnamed) > _MOST_NAMED else ""
        count = len(trace.unnamed)
        failures.append(
            f"{count} {'tensor is' if count == 1 else 'tensors are'} not in "
            f"kqv_trace.tensor.names, and not looked at: {named}{more}"
        )
    return failures
