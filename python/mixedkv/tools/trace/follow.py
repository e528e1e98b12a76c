"""Following each token through a trace that says where tokens are.

Every token is in exactly one tier, hot rows stay as they were, cold rows are what the hot ones
become in the cold tier's type, and the mask shows a query what its position lets it see.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .format import Step, StepData, Trace
from .masks import HIDDEN, contradiction, implied, mistaken, visible
from .stored import (
    Rows,
    as_float32,
    converted,
    copied,
    data_of,
    format_of,
    of_format,
    same_bits,
    zeros,
)

_MOST_FAILURES = 8
_MOST_CELLS = 1 << 22
"""Cells of a mask that are looked at at a time."""


class Before(NamedTuple):
    """A step's cold keys and values [Hkv, kv_cold, D or Dv] as they were while hot."""

    k: Rows
    v: Rows


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
        self._hot: dict[int, dict[int, tuple[Rows, Rows]]] = {}
        # Likewise as they were when first cold, where that is all that can be told.
        self._cold: dict[int, dict[int, tuple[Rows, Rows]]] = {}

    def follow(self, step: Step, data: StepData) -> Before | None:
        """Check a step's rows; give the cold ones as they were while hot, padding as zeros.

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
                seen[position] = (copied(now[0]), copied(now[1]))
                continue
            self.rows += 1
            if not all(map(same_bits, now, before)):
                self._fail(f"{where}: the hot rows of position {position} changed")
        if data.k_quant is None or data.v_quant is None or step.positions_quant is None:
            return None
        ks, vs = [], []
        for index, position in enumerate(step.positions_quant.tolist()):
            cold = (data.k_quant[:, index], data.v_quant[:, index])
            before = seen.get(position)
            if position < 0:
                before = (zeros(data.k, data.k.shape[:1]), zeros(data.v, data.v.shape[:1]))
            elif before is None:
                self.unknown += 1
                continue
            else:
                self.rows += 1
                if data.stored:
                    self._check_unchanged(step.layer, position, cold, where)
                else:
                    self._check_moved(position, cold, before, where)
            ks.append(before[0])
            vs.append(before[1])
        if len(ks) < step.kv_cold or len({format_of(row) for row in (*ks, data.k)}) > 1:
            return None
        return Before(_side_by_side(ks), _side_by_side(vs))

    def _check_moved(
        self, position: int, cold: tuple[Rows, Rows], hot: tuple[Rows, Rows], where: str
    ) -> None:
        """Cold rows are what the hot ones became."""
        for name, row, before in zip("KV", cold, hot, strict=True):
            if not _is_moved(row, before):
                self._fail(
                    f"{where}: the cold rows of position {position} ({name}) are not the "
                    f"{format_of(row).name} of what they were while hot"
                )

    def _check_unchanged(
        self, layer: int, position: int, cold: tuple[Rows, Rows], where: str
    ) -> None:
        """Cold rows stay what they stood for when they came there.

        What became of hot ones on the way is not to be told: it hangs on the rotation and on
        centers, which a trace does not hold.
        """
        seen = self._cold.setdefault(layer, {})
        if position not in seen:
            seen[position] = (copied(cold[0]), copied(cold[1]))
        elif not all(map(same_bits, cold, seen[position])):
            self._fail(f"{where}: the cold rows of position {position} changed")

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


def _side_by_side(rows: list[Rows]) -> Rows:
    """Give rows of tokens [Hkv, width] as [Hkv, tokens, width]."""
    return of_format(np.stack([data_of(row) for row in rows], 1), rows[0])


def _is_moved(cold: Rows, hot: Rows) -> bool:
    """Whether cold rows are what the hot ones become in the cold rows' format.

    With or without `fit_scales`: a trace does not tell.
    """
    name = format_of(cold).name
    if format_of(hot).name != name and not np.isfinite(as_float32(hot)).all():
        return True  # quantised to what is no number, which has many forms
    try:
        return any(same_bits(cold, converted(hot, name, fit_scales=fit)) for fit in (False, True))
    except ValueError:  # likewise
        return True
