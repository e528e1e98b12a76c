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
from .layout import as_float32
from .masks import HIDDEN, contradiction, implied, mistaken, visible

_MOST_FAILURES = 8
_MOST_CELLS = 1 << 22
"""Cells of a mask that are looked at at a time."""


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
    biased
        Layers whose masks add other numbers than 0 to the logits of keys that are seen.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.failures: list[str] = []
        self.rows = 0
        self.unknown = 0
        self.biased: set[int] = set()
        self._checked: set[int] = set()
        # layer -> position -> (k, v) [Hkv, D or Dv] as they were while hot
        self._hot: dict[int, dict[int, tuple[NDArray[Any], NDArray[Any]]]] = {}

    def follow(
        self, step: Step, data: StepData
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Check a step's rows; give its K and V [Hkv, kv, D or Dv] as if nothing were quantised.

        None where the trace does not tell where tokens are, or does not hold the rows.
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
        wrong = None
        for name, mask, keys in (
            ("K_quant", data.mask_quant, step.positions_quant),
            ("K", data.mask, step.positions),
        ):
            if mask is None or keys is None:
                continue
            together = max(1, _MOST_CELLS // len(keys))
            for start in range(0, step.n, together):
                part = mask[start : start + together]
                if step.first is not None and ((part > HIDDEN) & (part != 0)).any():
                    self.biased.add(step.layer)
                found = contradiction(
                    part, keys, None if step.first is None else step.first + start, window
                )
                if found is not None and wrong is None:
                    query, key, words = found
                    wrong = f"query {start + query} {words.format(at=f'key {key} of {name}')}"
        if wrong is None:
            return
        right = implied(step)
        how = None if right is None else mistaken(visible(data), right, step.kv_cold)
        self._fail(
            f"step {step.step} of layer {step.layer}: the mask contradicts the positions: {wrong}"
            + (f"; {how}" if how else "")
        )

    def _fail(self, message: str) -> None:
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(message)


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
