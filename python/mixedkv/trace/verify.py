"""Verifying a trace: somebody else's arithmetic over what the model's attention got and gave.

Three questions, kept apart:

- *Is the arithmetic right?* The recorded output against PyTorch in float32 and float64 on the very
  keys and values that were recorded (cold ones dequantised), element by element; and mixedkv's own
  op on every instruction set against the same. This decides the verdict.
- *Is each token where it belongs?* Where the trace tells positions: every token is in exactly one
  tier, hot rows stay as they were, and cold rows are the Q4_0 of what they were while hot. This
  decides too.
- *What does quantisation cost?* The recorded output against attention over the same tokens' keys
  and values as they were while hot, taken from the trace's earlier steps. A figure, not a verdict.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .arithmetic import (
    Problem,
    attend_mixedkv,
    attend_torch,
    isa_selected,
    probabilities,
    problem_of,
)
from .diagnose import diagnose
from .format import Step, StepData, Trace
from .gguf_file import TraceError
from .layout import as_float32
from .metrics import Difference, difference

STANDARD_TOLERANCE = 2e-5
"""Norm over norm, where no Q4_0 key or value takes part."""
MIXED_TOLERANCE = 1e-3
"""Where one does: Q4_0 kernels round the query."""
ELEMENT_FACTOR = 10.0
"""By default no element may be off by more than this times the tolerance times the largest value of
the step: a single wrong element hardly moves the norm of a long step."""
_MOST_DIAGNOSED = 3


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

    def passes(self, found: Difference, quantised: bool) -> bool:
        """Whether a difference is within the tolerance."""
        relative, absolute = self.of(found, quantised)
        return not found.not_finite and found.relative <= relative and found.max <= absolute


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
    isas
        mixedkv's own op, by instruction set, against PyTorch's float64.
    quantised
        A Q4_0 key or value was seen by some query.
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
    isas: dict[str, Difference]
    quantised: bool
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
        Of the trace as a whole: tokens that are not where they belong.
    """

    trace: Trace
    steps: list[StepResult]
    failures: list[str]
    rows_followed: int

    @property
    def passed(self) -> bool:
        """The verdict."""
        return bool(self.steps) and not self.failures and all(step.passed for step in self.steps)

    def worst(self, of: Callable[[StepResult], Difference | None]) -> Difference | None:
        """Give the largest relative difference over the steps, None where there is none."""
        found = [one for one in map(of, self.steps) if one is not None]
        return max(found, key=lambda one: one.relative) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        header = self.trace.header
        worst = self.worst(lambda step: step.torch_f32)
        cost = self.worst(lambda step: step.cost)
        return {
            "mixedkv": mkv.__version__,
            "torch": torch.__version__,
            "file": str(self.trace.path),
            "engine": self.trace.engine,
            "model": header.model if header else None,
            "cache": header.cache if header else None,
            "passed": self.passed,
            "failures": self.failures,
            "rows_followed": self.rows_followed,
            "worst_relative": worst.relative if worst else None,
            "worst_quantisation_cost": cost.relative if cost else None,
            "steps": [
                {**_plain_numbers(dataclasses.asdict(step)), "passed": step.passed}
                for step in self.steps
            ],
        }


def _plain_numbers(value: Any) -> Any:
    """Make of inf and NaN strings: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def verify(
    trace: Trace,
    *,
    tolerance: Tolerance | None = None,
    layers: Iterable[int] | None = None,
    isas: Sequence[str] | None = None,
    entropy: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Recompute every step and judge it.

    Parameters
    ----------
    layers
        Only these; None: all that are recorded.
    isas
        Instruction sets for mixedkv's own op; None: all of this machine.
    entropy
        Look at the weights too.
    progress
        Told of the steps done and in all.

    Raises
    ------
    TraceError
        A layer is not in the trace.
    """
    tolerance = tolerance or Tolerance()
    isas = mkv.isa.available() if isas is None else isas
    steps = trace.steps
    if layers is not None:
        wanted = set(layers)
        lacking = wanted - {step.layer for step in steps}
        if lacking:
            raise TraceError(f"{trace.path.name}: layer {min(lacking)} is not recorded")
        steps = [step for step in steps if step.layer in wanted]
    follower = _Follower(trace)
    results: list[StepResult] = []
    diagnosed = 0
    for done, step in enumerate(steps):
        if progress is not None:
            progress(done, len(steps))
        data = step.load()
        unquantised = follower.follow(step, data)
        result = _verify_step(
            step,
            data,
            tolerance,
            isas,
            entropy=entropy,
            unquantised=unquantised,
            diagnosing=diagnosed < _MOST_DIAGNOSED,
        )
        diagnosed += not result.passed
        results.append(result)
    if progress is not None:
        progress(len(steps), len(steps))
    return Verification(trace, results, follower.failures, follower.rows)


def _verify_step(
    step: Step,
    data: StepData,
    tolerance: Tolerance,
    isas: Sequence[str],
    *,
    entropy: bool,
    unquantised: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    diagnosing: bool,
) -> StepResult:
    problem = problem_of(data, step.info)
    want_f32 = attend_torch(problem, torch.float32)
    want_f64 = attend_torch(problem, torch.float64)
    of_f32, of_f64 = difference(data.out, want_f32), difference(data.out, want_f64)
    quantised = _quantised(data)
    failures, hints = [], []
    wrong = int((~np.isfinite(data.out)).sum())
    if wrong:
        # Arithmetic may agree on what is no number; attention that gave it is not right for that.
        failures.append(f"the recorded output holds {wrong} values that are not finite")
    for name, found in (("PyTorch f32", of_f32), ("PyTorch f64", of_f64)):
        failures += _judge(f"the recorded output against {name}", found, quantised, tolerance)
    if failures and diagnosing and not wrong:
        passing = tolerance.of(of_f32, quantised)[0]
        hints = diagnose(data, problem, want_f32, passing)
    own = {}
    for isa in isas:
        with isa_selected(isa):
            own[isa] = difference(attend_mixedkv(data, step.info), want_f64)
        failures += _judge(f"mixedkv's op on {isa} against PyTorch", own[isa], quantised, tolerance)
    cost = None
    if quantised and unquantised is not None:
        k, v = unquantised
        exact = attend_torch(dataclasses.replace(problem, k=k, v=v), torch.float64)
        cost = difference(data.out, exact)
    return StepResult(
        layer=step.layer,
        step=step.step,
        n=step.n,
        kv_hot=step.kv_hot,
        kv_cold=step.kv_cold,
        torch_f32=of_f32,
        torch_f64=of_f64,
        isas=own,
        quantised=quantised,
        tolerance=tolerance.of(of_f32, quantised),
        failures=failures,
        hints=hints,
        cost=cost,
        entropy=_entropy(problem) if entropy else None,
    )


def _judge(what: str, found: Difference, quantised: bool, tolerance: Tolerance) -> list[str]:
    if tolerance.passes(found, quantised):
        return []
    relative, absolute = tolerance.of(found, quantised)
    if found.not_finite:
        return [f"{what}: {found.not_finite} of {found.elements} elements are not finite"]
    if not found.relative <= relative:
        return [f"{what}: relative error {found.relative:.3g} is above {relative:.3g}"]
    return [f"{what}: an element is off by {found.max:.3g}, above {absolute:.3g}"]


def _quantised(data: StepData) -> bool:
    """Whether some query sees a Q4_0 key or value."""
    for k, v, mask in (
        (data.k, data.v, data.mask),
        (data.k_quant, data.v_quant, data.mask_quant),
    ):
        if k is None or v is None or mask is None:
            continue
        if np.uint8 in (k.dtype, v.dtype) and not np.isneginf(mask).all():
            return True
    return False


def _entropy(problem: Problem) -> TierEntropy:
    sums = {"hot": 0.0, "cold": 0.0}
    weights = {"hot": 0.0, "cold": 0.0}
    counts = {"hot": 0, "cold": 0}
    rows = 0
    for p in probabilities(problem):
        rows += p.shape[0] * p.shape[1]
        for tier, part in (("cold", p[..., : problem.cold]), ("hot", p[..., problem.cold :])):
            mass = part.sum(-1, dtype=np.float64)
            held = mass > 1e-12
            within = part[held] / mass[held][:, None]
            logs = np.log(within, out=np.zeros_like(within), where=within > 0)
            sums[tier] -= float((within * logs).sum(dtype=np.float64))
            counts[tier] += int(held.sum())
            weights[tier] += float(mass.sum())
    return TierEntropy(
        hot=sums["hot"] / counts["hot"] if counts["hot"] else None,
        cold=sums["cold"] / counts["cold"] if counts["cold"] else None,
        cold_share=weights["cold"] / rows if rows else 0.0,
    )


class _Follower:
    """Follows each token's rows from the step that they came in to the trace's end."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.failures: list[str] = []
        self.rows = 0
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
        seen = self._hot.setdefault(step.layer, {})
        complete = True
        where = f"step {step.step} of layer {step.layer}"
        for index, position in enumerate(step.positions.tolist()):
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
        for index, position in enumerate(step.positions_quant.tolist()):
            cold = (data.k_quant[:, index], data.v_quant[:, index])
            if position < 0:
                k, v = (np.asarray(as_float32(row)) for row in cold)
            else:
                before = seen.get(position)
                if before is None:
                    complete = False
                    continue
                self.rows += 1
                if not all(_is_quantised(*pair) for pair in zip(cold, before, strict=True)):
                    self._fail(
                        f"{where}: the cold rows of position {position} are not the Q4_0 of what "
                        "they were while hot"
                    )
                k, v = (as_float32(row) for row in before)
            ks.append(k)
            vs.append(v)
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
            parts.append(step.positions_quant[step.positions_quant >= 0])
        positions = np.concatenate(parts)
        unique, counts = np.unique(positions, return_counts=True)
        for position in unique[counts > 1].tolist()[:1]:
            self._fail(f"step {step.step}: position {position} is held more than once")
        header = self.trace.header
        if header is not None and len(header.step_tokens) >= step.step:
            total = sum(header.step_tokens[: step.step])
            held = set(unique.tolist())
            lacking = next((position for position in range(total) if position not in held), None)
            if lacking is not None:
                self._fail(f"step {step.step}: position {lacking} is in neither tier")

    def _fail(self, message: str) -> None:
        if len(self.failures) < 8:
            self.failures.append(message)


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and bool(a.tobytes() == b.tobytes())


def _is_quantised(cold: NDArray[Any], hot: NDArray[Any]) -> bool:
    """Whether cold rows are what the hot ones quantise to (True where they are of another type)."""
    if cold.dtype != np.uint8 or not np.isfinite(as_float32(hot)).all():
        return True
    if hot.dtype == np.uint8:
        return _same_bits(np.ascontiguousarray(cold), hot)
    return _same_bits(np.ascontiguousarray(cold), mkv.quantize_q4_0(np.ascontiguousarray(hot)))


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
                {"layer": layer, "step": step, "role": role, **_plain_numbers(vars(found))}
                for layer, step, role, found in self.steps
            ],
        }


def compare_traces(
    trace: Trace, reference: Trace, tolerance: Tolerance | None = None
) -> TraceComparison:
    """Compare the outputs of two traces step by step, and what else has the same shape.

    Only the outputs decide: with another cache, keys may rightly differ. A step that one of them
    lacks is a failure.

    Raises
    ------
    TraceError
        They have no step in common.
    """
    tolerance = tolerance or Tolerance()
    others = {(step.step, step.layer): step for step in reference.steps}
    found: list[tuple[int, int, str, Difference]] = []
    failures: list[str] = []
    shared = 0
    for step in trace.steps:
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
        quantised = _quantised(a) or _quantised(b)
        failures += [
            f"{where}: {words}"
            for words in _judge("the outputs of both", result, quantised, tolerance)
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
