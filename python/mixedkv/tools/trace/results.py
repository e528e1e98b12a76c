"""What verifying a trace gives, and the tolerances that decide the verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

import mixedkv as mkv

from .format import Trace
from .metrics import Difference, RowErrors

STANDARD_TOLERANCE = 2e-5
"""Norm over norm, where no key or value in blocks (Q4_0 and its like) takes part."""
MIXED_TOLERANCE = 1e-3
"""Where one does: kernels for blocks round the query."""
ELEMENT_FACTOR = 10.0
"""By default no element may be off by more than this times the tolerance times the largest value of
the step: a single wrong element hardly moves the norm of a long step."""
HEAD_FACTOR = 5.0
"""A head over all of a step's queries may be off by this times the tolerance: the norm of a step
hides a small head beside a large one."""
ROW_FACTOR = 10.0
"""And a head of one query by this times."""


@dataclass(frozen=True)
class Tolerance:
    """What passes; None: the default, by what takes part in a step.

    Attributes
    ----------
    relative
        Of the norm of a step's difference over the norm.
    absolute
        Of each element.
    """

    relative: float | None = None
    absolute: float | None = None

    def of(self, found: Difference, quantised: bool) -> tuple[float, float]:
        """Give (relative, absolute) for a step."""
        relative = self.relative
        if relative is None:
            relative = MIXED_TOLERANCE if quantised else STANDARD_TOLERANCE
        absolute = self.absolute
        if absolute is None:
            absolute = ELEMENT_FACTOR * relative * found.scale
        return relative, absolute

    def judge(
        self,
        what: str,
        found: Difference,
        quantised: bool,
        rows: RowErrors | None = None,
        *,
        own: tuple[Difference, RowErrors] | None = None,
    ) -> list[str]:
        """Say in words what is out of tolerance; nothing where all is within.

        Parameters
        ----------
        own
            What PyTorch's float32 is off from its float64, where that is more than rounding: it
            comes on top of the tolerance, for the worst head, row and element twice: what is
            judged may be off as much the other way.
        """
        relative, absolute = self.of(found, quantised)
        of_head, of_row = HEAD_FACTOR * relative, ROW_FACTOR * relative
        if own is not None and not own[0].not_finite:
            relative, absolute = relative + own[0].relative, absolute + 2 * own[0].max
            of_head += 2 * own[1].head_relative
            of_row += 2 * own[1].row_relative
        if found.not_finite:
            return [f"{what}: {found.not_finite} of {found.elements} elements are not finite"]
        worst = f" (worst: head {rows.head} with {rows.head_relative:.3g})" if rows else ""
        # The comparisons are this way round for the sake of NaN.
        if not found.relative <= relative:
            return [f"{what}: relative error {found.relative:.3g} is above {relative:.3g}{worst}"]
        error = "has a relative error of"
        if rows and not rows.head_relative <= of_head:
            return [
                f"{what}: head {rows.head} {error} {rows.head_relative:.3g}, above {of_head:.3g}"
            ]
        if rows and not rows.row_relative <= of_row:
            where = f"query {rows.row_query} of head {rows.row_head}"
            return [f"{what}: {where} {error} {rows.row_relative:.3g}, above {of_row:.3g}"]
        if not found.max <= absolute:
            return [f"{what}: an element is off by {found.max:.3g}, above {absolute:.3g}"]
        return []


@dataclass(frozen=True)
class TierEntropy:
    """How attention spreads, averaged over heads and queries.

    Attributes
    ----------
    hot, cold
        Entropy in nats of the weights within the tier; None where it has no weight.
    cold_share
        Share of all weight that falls on cold keys.
    """

    hot: float | None
    cold: float | None
    cold_share: float


@dataclass(frozen=True)
class StepResult:
    """One layer in one step.

    Attributes
    ----------
    torch_f32, torch_f64
        The recorded output against PyTorch's.
    torch_own
        PyTorch's float32 against its float64: what no arithmetic in float32 can be blamed for.
    isas
        mixedkv's own op, by instruction set, against PyTorch's float64.
    quantised
        A key or value in blocks, such as Q4_0, was seen by some query.
    plain
        Why mixedkv's own op attended blocks over plain rows, and not in a cache; None: it did not.
    worst
        The head and the row of the recorded output that are farthest from PyTorch's float32.
    blind
        How many of its queries see no key: their output is zero, whatever the arithmetic.
    tolerance
        (relative, absolute) that held for it.
    failures
        What was out of tolerance, in words; empty: it passed.
    hints
        What might explain it.
    cost
        The recorded output against attention over unquantised keys and values; None where nothing
        was quantised or the trace does not hold them.
    """

    layer: int
    step: int
    n: int
    kv_hot: int
    kv_cold: int
    torch_f32: Difference
    torch_f64: Difference
    torch_own: Difference
    isas: dict[str, Difference]
    worst: RowErrors
    blind: int
    quantised: bool
    plain: str | None
    tolerance: tuple[float, float]
    failures: list[str]
    hints: list[str] = field(default_factory=list)
    cost: Difference | None = None
    entropy: TierEntropy | None = None

    @property
    def passed(self) -> bool:
        """Whether all was in tolerance."""
        return not self.failures


@dataclass(frozen=True)
class Verification:
    """What came out.

    Attributes
    ----------
    failures
        Of the trace as a whole: tokens that are not where they belong, masks that contradict the
        positions, or nothing to verify.
    rows_followed
        Rows of keys and values that were held against those of an earlier step.
    remarks
        What such a trace can't show, or does not say, and is therefore not part of the verdict.
    """

    trace: Trace
    steps: list[StepResult]
    failures: list[str]
    rows_followed: int
    remarks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """The verdict."""
        return bool(self.steps) and not self.failures and all(step.passed for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        header, costs = self.trace.header, [step.cost for step in self.steps if step.cost]
        return {
            "mixedkv": mkv.__version__,
            "torch": torch.__version__,
            "file": str(self.trace.path),
            "engine": self.trace.engine,
            "model": header.model if header else None,
            "cache": header.cache if header else None,
            "passed": self.passed,
            "failures": self.failures,
            "remarks": self.remarks,
            "rows_followed": self.rows_followed,
            "worst_relative": max((step.torch_f32.relative for step in self.steps), default=None),
            "worst_quantisation_cost": max((cost.relative for cost in costs), default=None),
            "worst_head_relative": max(
                (step.worst.head_relative for step in self.steps), default=None
            ),
            "steps": [{**dataclasses.asdict(step), "passed": step.passed} for step in self.steps],
        }
