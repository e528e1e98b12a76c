"""Following each token through a trace that says where tokens are.

Every token is in exactly one tier, hot rows stay as they were, cold rows are what the hot ones
become in the cold tier's type, and the mask shows a query what its position lets it see.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from .format import Step, StepData, Trace
from .gguf_file import TraceError
from .layout import as_float32

_MOST_FAILURES = 8
_MOST_CELLS = 1 << 22
"""Cells of a mask that are looked at at a time."""
_SURELY_SEEN = -1e4
"""A mask's entry above shows the key: others may be another tool's way to write -inf."""


class Follower:
    """Follows each token's rows from the step that they came in to the trace's end.

    Attributes
    ----------
    failures
        What is not where it belongs, in words.
    rows
        Rows that were held against those of an earlier step.
    unknown
        Cold rows that no step of the trace has while they were hot.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.failures: list[str] = []
        self.rows = 0
        self.unknown = 0
        self._checked: set[int] = set()
        # layer -> position -> (k, v) [Hkv, D or Dv] as they were while hot
        self._hot: dict[int, dict[int, tuple[NDArray[Any], NDArray[Any]]]] = {}

    def follow(
        self, step: Step, data: StepData
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Check a step's rows; give its K and V [Hkv, kv, D or Dv] as if nothing were quantised.

        None where the trace does not tell where tokens are, or does not hold the rows.

        Raises
        ------
        TraceError
            The mask shows a query a key that is said to be padding.
        """
        if step.positions is None:
            return None
        self._check_positions(step)
        self._check_mask(step, data)
        seen = self._hot.setdefault(step.layer, {})
        where = f"step {step.step} of layer {step.layer}"
        for index, position in enumerate(step.positions.tolist()):
            if position < 0:
                continue  # padding holds anything
            now = (data.k[:, index], data.v[:, index])
            before = seen.get(position)
            if before is None:
                seen[position] = (np.array(now[0]), np.array(now[1]))
                continue
            self.rows += 1
            if not all(map(_same_bits, now, before)):
                self._fail(f"{where}: the hot rows of position {position} changed")
        if data.k_quant is None or data.v_quant is None or step.positions_quant is None:
            return None
        ks, vs = [], []
        complete = True
        for index, position in enumerate(step.positions_quant.tolist()):
            cold = (data.k_quant[:, index], data.v_quant[:, index])
            before = seen.get(position)
            if position < 0:
                before = cold
            elif before is None:
                complete = False
                self.unknown += 1
                continue
            else:
                self.rows += 1
                for name, row, hot in zip("KV", cold, before, strict=True):
                    if not _is_moved(row, hot):
                        kind = "Q4_0" if row.dtype == np.uint8 else row.dtype.name
                        self._fail(
                            f"{where}: the cold rows of position {position} ({name}) are not the "
                            f"{kind} of what they were while hot"
                        )
            ks.append(as_float32(before[0]))
            vs.append(as_float32(before[1]))
        if not complete:
            return None
        return (
            np.concatenate([np.stack(ks, 1), as_float32(data.k)], 1),
            np.concatenate([np.stack(vs, 1), as_float32(data.v)], 1),
        )

    def _check_positions(self, step: Step) -> None:
        """Every position so far is in exactly one tier."""
        if step.step in self._checked or step.positions is None:
            return
        self._checked.add(step.step)
        parts = [step.positions]
        if step.positions_quant is not None:
            parts.append(step.positions_quant)
        positions = np.concatenate(parts)
        unique, counts = np.unique(positions[positions >= 0], return_counts=True)
        for position in unique[counts > 1].tolist()[:1]:
            self._fail(f"step {step.step}: position {position} is held more than once")
        if step.first is not None:
            gaps = np.flatnonzero(unique != np.arange(unique.size))
            lacking = int(gaps[0]) if gaps.size else unique.size
            if lacking < step.first + step.n:
                self._fail(f"step {step.step}: position {lacking} is in neither tier")

    def _check_mask(self, step: Step, data: StepData) -> None:
        """Hold the mask against the positions, as far as the trace tells what is right."""
        window = step.info.window_left
        for name, mask, keys in (
            ("K_quant", data.mask_quant, step.positions_quant),
            ("K", data.mask, step.positions),
        ):
            if mask is None or keys is None:
                continue
            together = max(1, _MOST_CELLS // len(keys))
            for start in range(0, step.n, together):
                part = mask[start : start + together]
                found = _contradiction(
                    part, keys, None if step.first is None else step.first + start, window
                )
                if found is None:
                    continue
                query, key, words = found
                where = (
                    f"step {step.step} of layer {step.layer}: the mask contradicts the positions: "
                    f"query {start + query} {words.format(at=f'key {key} of {name}')}"
                )
                if keys[key] < 0:
                    raise TraceError(f"{self.trace.path.name}: {where}")
                self._fail(where)
                return

    def _fail(self, message: str) -> None:
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(message)


def _contradiction(
    mask: NDArray[np.float32],
    keys: NDArray[np.int64],
    first: int | None,
    window: int | None,
) -> tuple[int, int, str] | None:
    """Find the first cell of a mask [queries, keys] that its positions don't allow.

    Gives (query, key, what is wrong; `{at}` stands for the key). Without `first`, the position of
    the first query, padding alone is certain; without `window`, a hidden key may be right.
    """
    seen, hidden = mask > _SURELY_SEEN, np.isneginf(mask)
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
        checks.append((hidden & within, "does not see {at} at position {key}, which it should"))
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


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and bool(a.tobytes() == b.tobytes())


def _is_moved(cold: NDArray[Any], hot: NDArray[Any]) -> bool:
    """Whether cold rows are what the hot ones become in the cold rows' type."""
    if not np.isfinite(as_float32(hot)).all():
        return True  # quantised to what is no number, which has many forms
    if cold.dtype == hot.dtype:
        return _same_bits(cold, hot)
    if cold.dtype == np.uint8:
        return _same_bits(cold, mkv.quantize_q4_0(np.ascontiguousarray(hot)))
    with np.errstate(over="ignore"):
        return _same_bits(cold, as_float32(hot).astype(cold.dtype))
