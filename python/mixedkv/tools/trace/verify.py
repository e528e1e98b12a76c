"""Verifying a trace: somebody else's arithmetic over what the model's attention got and gave.

Three questions, kept apart:

- *Is the arithmetic right?* The recorded output against PyTorch in float32 and float64 on the very
  keys and values that were recorded (cold ones dequantised), element by element; and mixedkv's own
  op on every instruction set against the same. This decides the verdict.
- *Is the trace whole?* Every step of every layer that its metadata tells of is there, and no tensor
  is left over. This decides too.
- *Is each token where it belongs?* Where the trace tells positions: every token is in exactly one
  tier, hot rows stay as they were, cold rows are what those become in the cold type, and the
  mask shows each query what its position lets it see. This decides too.
- *What does quantisation cost?* The recorded output against attention over the same tokens' keys
  and values as they were while hot, taken from the trace's earlier steps. A figure, not a verdict.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch

import mixedkv as mkv

from ..progress import SILENT, Progress
from .arithmetic import (
    Problem,
    attend_torch,
    isa_selected,
    magnitude,
    probabilities,
    problem_of,
    sees_quantised,
)
from .complete import incomplete
from .diagnose import diagnose
from .follow import Before, Follower
from .format import Step, StepData, Trace
from .gguf_file import TraceError
from .masks import implied
from .metrics import difference, row_errors
from .reference import TraceComparison, compare_traces
from .replay import OwnOp
from .results import StepResult, TierEntropy, Tolerance, Verification
from .stored import as_float32

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
    progress: Progress = SILENT,
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
        Told of the steps.

    Raises
    ------
    TraceError
        A layer is not in the trace.
    """
    tolerance = tolerance or Tolerance()
    isas = mkv.isa.available() if isas is None else isas
    steps = trace.steps
    wanted = None if layers is None else set(layers)
    if wanted is not None:
        lacking = wanted - {step.layer for step in steps}
        if lacking:
            raise TraceError(f"{trace.path.name}: layer {min(lacking)} is not recorded")
        steps = [step for step in steps if step.layer in wanted]
    follower = Follower(trace)
    results: list[StepResult] = []
    diagnosed = 0
    progress.phase("verifying", len(steps))
    for done, step in enumerate(steps):
        progress.at(done, len(steps))
        data = step.load()
        before = follower.follow(step, data)
        result = _verify_step(
            step,
            data,
            tolerance,
            isas,
            entropy=entropy,
            before=before,
            diagnosing=diagnosed < _MOST_DIAGNOSED,
        )
        diagnosed += not result.passed
        results.append(result)
    progress.at(len(steps), len(steps))
    failures = [*incomplete(trace, wanted), *follower.failures]
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
    before: Before | None,
    diagnosing: bool,
) -> StepResult:
    problem = problem_of(data, step.info)
    want_f32 = attend_torch(problem, torch.float32)
    want_f64 = attend_torch(problem, torch.float64)
    # What rounding errors are in proportion to: a head whose values cancel has an output near 0.
    whole = magnitude(problem)
    of_f32, of_f64 = difference(data.out, want_f32), difference(data.out, want_f64)
    # What arithmetic in float32 is off by at these logits.
    torch_own = difference(want_f32, want_f64)
    own_rows = row_errors(want_f32, want_f64, whole)
    worst = row_errors(data.out, want_f32, whole)
    quantised = sees_quantised(data)
    failures, hints = [], []
    wrong = int((~np.isfinite(data.out)).sum())
    if wrong:
        # Arithmetic may agree on what is no number; attention that gave it is not right for that.
        queries = _count(int((~np.isfinite(data.out)).any((1, 2)).sum()), "query", "queries")
        theirs = int((~np.isfinite(want_f64)).sum())
        failures.append(
            f"the recorded output holds {_count(wrong, 'value', 'values')} that "
            f"{'is' if wrong == 1 else 'are'} not finite, of {queries} (PyTorch's: {theirs})"
        )
    # A step is held to the tolerance as it is; a small head or element need not be nearer to
    # PyTorch's float32 than that is to float64.
    off = tolerance.judge(
        "the recorded output against PyTorch f32",
        of_f32,
        quantised,
        worst,
        own=(dataclasses.replace(torch_own, relative=0.0), own_rows),
    )
    if not off:
        what = "the recorded output against PyTorch f64"
        rows_f64 = row_errors(data.out, want_f64, whole)
        off = tolerance.judge(what, of_f64, quantised, rows_f64, own=(torch_own, own_rows))
    failures += off
    passing = tolerance.of(of_f32, quantised)[0]
    if off and not wrong:
        if (
            torch_own.relative > passing / 10
            and of_f64.relative <= passing + 2 * torch_own.relative
        ):
            hints = [
                "PyTorch's own float32 is off from its float64 by "
                f"{torch_own.relative:.2g} here, as logits are large: the recorded output is about "
                "as near to float64"
            ]
        elif diagnosing:
            hints = diagnose(data, problem, want_f32, passing, implied(step))
    own = {}
    own_op = OwnOp(data, step.info, before)
    for isa in isas:
        with isa_selected(isa):
            out = own_op.attend()
        own[isa] = difference(out, want_f64)
        what = f"mixedkv's op on {isa} against PyTorch f64"
        rows = row_errors(out, want_f64, whole)
        failures += tolerance.judge(what, own[isa], quantised, rows, own=(torch_own, own_rows))
    cost = None
    if quantised and before is not None:
        k = np.concatenate([as_float32(before.k), as_float32(data.k)], 1)
        v = np.concatenate([as_float32(before.v), as_float32(data.v)], 1)
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
        torch_own=torch_own,
        isas=own,
        worst=worst,
        blind=int(np.isneginf(problem.mask).all(1).sum()),
        quantised=quantised,
        plain=own_op.plain,
        tolerance=tolerance.of(of_f32, quantised),
        failures=failures,
        hints=hints,
        cost=cost,
        entropy=_entropy(problem) if entropy else None,
    )


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _remarks(steps: Sequence[Step], results: Sequence[StepResult], follower: Follower) -> list[str]:
    """Say what these steps can't show, or don't tell, so that the verdict does not cover it."""
    infos = [step.info for step in steps]
    layers = ", ".join(map(str, sorted(follower.biased)))
    of_layers, add = ("masks of layers", "add") if ", " in layers else ("mask of layer", "adds")
    plain = [result.plain for result in results if result.plain is not None]
    blind = [result.blind for result in results if result.blind]
    one_head = all(info.num_kv_heads == 1 for info in infos)
    unplaced = any(step.positions is None for step in steps)
    uncounted = any(step.first is None for step in steps)
    told: list[tuple[object, str]] = [
        (
            all(step.n == 1 for step in steps),
            "no step has several queries: mistakes in the layout of Q, of the output and of the "
            "mask's rows can't show",
        ),
        (one_head, "one kv head: mistakes in the layout of K and V can't show"),
        (
            not one_head and all(info.num_kv_heads == info.num_qo_heads for info in infos),
            "each query head has a kv head of its own: mistakes in how heads share can't show",
        ),
        (
            unplaced,
            "no positions are recorded: not checked is whether each token is in exactly one tier, "
            "whether its rows stay as they were, and whether the mask shows each query what it "
            "should see",
        ),
        (
            uncounted and not unplaced,
            "how many tokens each step took is not recorded: not checked is whether tokens are "
            "lost, and whether the mask shows each query what it should see",
        ),
        (
            not unplaced and not uncounted and any(info.window_left is None for info in infos),
            "the layers' windows are not recorded: not checked is whether the mask hides keys that "
            "a query should see",
        ),
        (
            layers,
            f"the {of_layers} {layers} {add} other numbers than 0 to the logits of keys that are "
            "seen (ALiBi or another bias): whether they are the right ones is not checked",
        ),
        (
            follower.unknown,
            f"{follower.unknown} cold rows are in no step while hot: not checked is what they were",
        ),
        (
            any(step.stored and step.kv_cold for step in steps),
            "the cache changes rows (rotate, center_keys), the trace holds what they stand for: "
            "not checked is what became of rows that moved to cold, but for what it cost",
        ),
        (
            plain,
            f"in {_count(len(plain), 'step', 'steps')} with keys or values in blocks mixedkv's own "
            f"op read plain rows, not a cache's packed ones: {plain[0] if plain else ''}",
        ),
        (
            blind,
            f"{_count(sum(blind), 'query', 'queries')} of {_count(len(blind), 'step', 'steps')} "
            f"{'sees' if sum(blind) == 1 else 'see'} no key: nothing but zero was compared",
        ),
    ]
    return [words for holds, words in told if holds]


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
