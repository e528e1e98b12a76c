"""Verifying a trace: somebody else's arithmetic over what the model's attention got and gave.

Three questions, kept apart:

- *Is the arithmetic right?* The recorded output against PyTorch in float32 and float64 on the very
  keys and values that were recorded (cold ones dequantised), element by element; and mixedkv's own
  op on every instruction set against the same. This decides the verdict.
- *Is each token where it belongs?* Where the trace tells positions: every token is in exactly one
  tier, hot rows stay as they were, cold rows are the Q4_0 of what they were while hot, and the
  mask shows each query what its position lets it see. This decides too.
- *What does quantisation cost?* The recorded output against attention over the same tokens' keys
  and values as they were while hot, taken from the trace's earlier steps. A figure, not a verdict.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .arithmetic import (
    Problem,
    attend_mixedkv,
    attend_torch,
    isa_selected,
    magnitude,
    probabilities,
    problem_of,
    sees_quantised,
)
from .diagnose import diagnose
from .follow import Follower
from .format import Step, StepData, Trace
from .gguf_file import TraceError
from .metrics import difference, row_errors
from .reference import TraceComparison, compare_traces
from .results import StepResult, TierEntropy, Tolerance, Verification

__all__ = [
    "StepResult",
    "TierEntropy",
    "Tolerance",
    "TraceComparison",
    "Verification",
    "compare_traces",
    "verify",
]

_MOST_DIAGNOSED = 3


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
        A layer is not in the trace, or a query sees a key that is said to be padding.
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
    follower = Follower(trace)
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
    failures = follower.failures
    if all(result.blind == result.n for result in results):
        failures = [*failures, "no query of any step sees a key: there is nothing to verify"]
    return Verification(trace, results, failures, follower.rows, _remarks(steps, results, follower))


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
    # What rounding errors are in proportion to: a head whose values cancel has an output near 0.
    whole = magnitude(problem)
    of_f32, of_f64 = difference(data.out, want_f32), difference(data.out, want_f64)
    worst = row_errors(data.out, want_f32, whole)
    quantised = sees_quantised(data)
    failures, hints = [], []
    wrong = int((~np.isfinite(data.out)).sum())
    if wrong:
        # Arithmetic may agree on what is no number; attention that gave it is not right for that.
        failures.append(f"the recorded output holds {wrong} values that are not finite")
    for name, found, rows in (
        ("PyTorch f32", of_f32, worst),
        ("PyTorch f64", of_f64, row_errors(data.out, want_f64, whole)),
    ):
        what = f"the recorded output against {name}"
        failures += tolerance.judge(what, found, quantised, rows)
    if failures and diagnosing and not wrong:
        passing = tolerance.of(of_f32, quantised)[0]
        hints = diagnose(data, problem, want_f32, passing)
    own = {}
    for isa in isas:
        with isa_selected(isa):
            out = attend_mixedkv(data, step.info)
        own[isa] = difference(out, want_f64)
        what = f"mixedkv's op on {isa} against PyTorch"
        failures += tolerance.judge(what, own[isa], quantised, row_errors(out, want_f64, whole))
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
        worst=worst,
        blind=int(np.isneginf(problem.mask).all(1).sum()),
        quantised=quantised,
        tolerance=tolerance.of(of_f32, quantised),
        failures=failures,
        hints=hints,
        cost=cost,
        entropy=_entropy(problem) if entropy else None,
    )


def _remarks(steps: Sequence[Step], results: Sequence[StepResult], follower: Follower) -> list[str]:
    """Say what these steps can't show, or don't tell, so that the verdict does not cover it."""
    infos = [step.info for step in steps]
    remarks = []
    if all(step.n == 1 for step in steps):
        remarks.append(
            "no step has several queries: mistakes in the layout of Q, of the output and of the "
            "mask's rows can't show"
        )
    if all(info.num_kv_heads == 1 for info in infos):
        remarks.append("one kv head: mistakes in the layout of K and V can't show")
    elif all(info.num_kv_heads == info.num_qo_heads for info in infos):
        remarks.append(
            "each query head has a kv head of its own: mistakes in how heads share can't show"
        )
    if any(step.positions is None for step in steps):
        remarks.append(
            "no positions are recorded: not checked is whether each token is in exactly one tier, "
            "whether its rows stay as they were, and whether the mask shows each query what it "
            "should see"
        )
    elif any(step.first is None for step in steps):
        remarks.append(
            "how many tokens each step took is not recorded: not checked is whether tokens are "
            "lost, and whether the mask shows each query what it should see"
        )
    elif any(info.window_left is None for info in infos):
        remarks.append(
            "the layers' windows are not recorded: not checked is whether the mask hides keys that "
            "a query should see"
        )
    if follower.unknown:
        remarks.append(
            f"{follower.unknown} cold rows are in no step while hot: not checked is what they were"
        )
    blind = [result for result in results if result.blind]
    if blind:
        queries = sum(result.blind for result in blind)
        remarks.append(
            f"{queries} queries of {len(blind)} steps see no key: nothing but zero was compared"
        )
    return remarks


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
