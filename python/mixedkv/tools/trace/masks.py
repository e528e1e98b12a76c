"""Masks: what a recorded one shows, what positions make of it, and how it may be mistaken."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .format import Step, StepData

HIDDEN = -1e4
"""An entry at or below hides the key: besides -inf, engines write the least number of a type."""
_MOST_CELLS = 1 << 26
"""Masks of more cells are not laid out to see how they are mistaken."""


def contradiction(
    mask: NDArray[np.float32],
    keys: NDArray[np.int64],
    first: int | None,
    window: int | None,
) -> tuple[int, int, str] | None:
    """Find the first cell of a mask [queries, keys] that its positions don't allow.

    Gives (query, key, what is wrong; `{at}` stands for the key). Without `first`, the position of
    the first query, padding alone is certain; without `window`, a hidden key may be right.
    """
    seen = mask > HIDDEN
    padding = keys < 0
    found = _first(seen & padding)
    if found is not None:
        return *found, "sees {at}, which is padding (-1)"
    if first is None:
        return None
    queries = first + np.arange(len(mask))
    distance = queries[:, None] - keys[None, :]
    later = distance < 0
    checks = [(seen & later, "sees {at} at position {key}, which comes later")]
    if window is not None:
        within = ~padding & ~later
        if window >= 0:
            outside = within & (distance > window)
            within &= ~outside
            words = f"sees {{at}} at position {{key}}, outside of its window of {window}"
            checks.append((seen & outside, words))
        checks.append((~seen & within, "does not see {at} at position {key}, which it should"))
    for wrong, words in checks:
        found = _first(wrong)
        if found is not None:
            query, key = found
            words = words.replace("{key}", str(keys[key]))
            return query, key, f"(position {queries[query]}) {words}"
    return None


def _first(wrong: NDArray[np.bool_]) -> tuple[int, int] | None:
    if not wrong.any():
        return None
    query, key = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return int(query), int(key)


def visible(data: StepData) -> NDArray[np.bool_]:
    """Give which key each query sees, [n, kv], cold keys before hot ones."""
    parts = [mask for mask in (data.mask_quant, data.mask) if mask is not None]
    shown: NDArray[np.bool_] = np.concatenate(parts, 1) > HIDDEN
    return shown


def implied(step: Step) -> NDArray[np.bool_] | None:
    """Give what `visible` should be by the positions; None where they don't tell.

    Where the queries' positions are not recorded, the last query is taken to be the newest key.
    """
    if step.positions is None or step.n * (step.kv_hot + step.kv_cold) > _MOST_CELLS:
        return None
    parts = [part for part in (step.positions_quant, step.positions) if part is not None]
    keys = np.concatenate(parts)
    first = step.first if step.first is not None else int(keys.max(initial=-1)) - step.n + 1
    return sees(first, step.n, keys, step.info.window_left)


def sees(
    first: int, queries: int, keys: NDArray[np.int64], window_left: int | None
) -> NDArray[np.bool_]:
    """Give which of the keys, by position, queries see that stand at `first` and after it.

    A query at p sees keys at p - window_left (None or -1: 0) to p; a key at -1 is padding.
    """
    distance = (first + np.arange(queries))[:, None] - keys[None, :]
    shown: NDArray[np.bool_] = (distance >= 0) & (keys >= 0)[None, :]
    if window_left is not None and window_left >= 0:
        shown &= distance <= window_left
    return shown


def mistaken(recorded: NDArray[np.bool_], right: NDArray[np.bool_], cold: int) -> str | None:
    """Say how a recorded mask came from the right one, None where no known way gives it."""
    n, kv = right.shape
    if np.array_equal(recorded, right):
        return None
    if recorded.all():
        return "the recorded mask is ignored or zeroed: it hides nothing"
    if not recorded.any():
        return "the recorded mask hides everything"
    ways: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("reversed: its keys stand backwards", recorded[:, ::-1], right),
        ("reversed: its queries stand backwards", recorded[::-1], right),
        ("reversed: keys and queries stand backwards", recorded[::-1, ::-1], right),
        ("inverted: it hides what a query sees", ~recorded, right),
        ("one key too late", recorded[:, 1:], right[:, :-1]),
        ("one key too early", recorded[:, :-1], right[:, 1:]),
    ]
    if 0 < cold < kv:
        ways.insert(0, ("exchanged", np.roll(recorded, cold, 1), right))
    if n == kv:
        ways.insert(0, ("transposed: [key, query]", recorded.T, right))
    for words, one, other in ways:
        if np.array_equal(one, other):
            if words == "exchanged":
                return "the parts of the recorded mask are exchanged: hot then cold"
            return f"the recorded mask is {words}"
    return None
