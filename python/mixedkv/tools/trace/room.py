"""How much memory verifying a trace takes, known before anything of its tensors is read.

A file may be sparse: what it claims to hold can be a thousand times what it takes on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..memory import available, in_words
from .arithmetic import MOST_HELD
from .format import Step, Trace
from .gguf_file import TraceError

SHARE = 0.5
"""Of the memory that is free: what verifying may take."""

_KEY_BYTES = 32
_ROW_BYTES = 64
_MASK_BYTES = 32
_LOGIT_BYTES = 48
"""At most for a value of the keys and values (float32 of each tier and joined, float64, their
magnitudes, a cache's own rows, what they were while hot), for a value of the queries and outputs
(float32, and float64 of three computations and their differences), for a cell of the mask, and for
a logit (float64 with its mask, the weights, and what the softmax holds between them)."""


def step_bytes(step: Step) -> int:
    """Give an upper bound of the bytes that verifying a step of a layer takes."""
    info = step.info
    width = info.head_dim + info.head_dim_v
    kv = step.kv_hot + step.kv_cold
    logits = min(info.num_qo_heads * step.n * kv, max(MOST_HELD, kv))
    return (
        _KEY_BYTES * info.num_kv_heads * kv * width
        + _ROW_BYTES * info.num_qo_heads * step.n * width
        + _MASK_BYTES * step.n * kv
        + _LOGIT_BYTES * logits
    )


def kept_bytes(steps: Sequence[Step]) -> int:
    """Give the bytes of the rows that are kept from step to step, to be followed by position.

    Of each layer the hot ones, once for each position; the cold ones too where these stand for
    others, in as many bytes.
    """
    by_layer: dict[int, list[Step]] = {}
    for step in steps:
        if step.positions is not None:
            by_layer.setdefault(step.layer, []).append(step)
    counts: dict[tuple[int, ...], int] = {}  # layers that were recorded in the same steps share
    total = 0
    for group in by_layer.values():
        key = tuple(step.step for step in group)
        if key not in counts:
            known = [step.positions for step in group if step.positions is not None]
            counts[key] = len(np.unique(np.concatenate(known)))
        row = max(_stored(step, "k") + _stored(step, "v") for step in group)
        row *= 2 if any(step.stored for step in group) else 1
        total += counts[key] * row
    return total


def _stored(step: Step, role: str) -> int:
    """Give the bytes of a key or value of all kv heads as the file stores it, at most."""
    format = step.tensors[role].format
    width = {"k": step.info.head_dim, "v": step.info.head_dim_v}[role]
    return step.info.num_kv_heads * (4 * width if format is None else format.row_bytes(width))


def check_room(trace: Trace, layers: Iterable[int] | None = None) -> None:
    """Refuse a trace with a step that this machine has no memory to verify.

    Beside what the step itself takes stand the rows that are followed through the trace.

    Parameters
    ----------
    layers
        Only these; None: all that are recorded.

    Raises
    ------
    TraceError
        It would take more than `SHARE` of what is free.
    """
    wanted = None if layers is None else set(layers)
    steps = [step for step in trace.steps if wanted is None or step.layer in wanted]
    room = SHARE * available()
    kept = kept_bytes(steps)
    for step in steps:
        needed = step_bytes(step) + kept
        if needed > room:
            raise TraceError(
                f"{trace.path.name}: step {step.step} of layer {step.layer} would take "
                f"{in_words(needed)} of memory to verify, more than the {in_words(room)} that are "
                "half of what is free"
            )
