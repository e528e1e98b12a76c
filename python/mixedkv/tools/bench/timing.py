"""Interleaved timing: every round calls every contender in turn.

A machine that others share drifts by factors within seconds. Contenders that take turns see the
same drift, so the ratio within a round means something where two times minutes apart do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Timed calls of a turn go on for about this long.
TURN_SECONDS = 10e-3
#: Untimed calls before them: others have emptied the caches meanwhile, and one pass over the keys
#: does not fill them again. A call that takes longer than this reads more than caches hold anyway,
#: and gets no untimed one.
WARM_SECONDS = 10e-3
#: Most calls a turn.
TURN_CALLS = 1000
#: Thread pools spin for some milliseconds after a call and would take a core from the next
#: contender: wait for them to fall asleep, at most this long.
SETTLE_SECONDS = 250e-3


@dataclass(frozen=True)
class Clock:
    """Where time comes from; the tests put in their own."""

    now: Callable[[], float] = time.perf_counter
    #: CPU seconds of all threads of this process.
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Run:
    """Something to time: a call, or one that times itself and returns the seconds of a call."""

    name: str
    call: Callable[[], object]
    self_timed: bool = False


@dataclass
class Timing:
    """What one contender took."""

    name: str
    #: Timed calls a turn.
    calls: int
    #: Median of a turn's calls, a round each.
    rounds: list[float] = field(default_factory=list)
    #: Shortest single call.
    best: float = float("inf")

    @property
    def median(self) -> float:
        """Median of the rounds, seconds."""
        return statistics.median(self.rounds)


def settle(clock: Clock) -> None:
    """Wait until this process's other threads are quiet."""
    end = clock.now() + SETTLE_SECONDS
    while True:
        wall, cpu = clock.now(), clock.cpu()
        clock.sleep(5e-4)
        elapsed = clock.now() - wall
        if clock.cpu() - cpu < 0.25 * elapsed or clock.now() >= end:
            return


def _turn(run: Run, calls: int, clock: Clock) -> list[float]:
    if run.self_timed:
        seconds = run.call()
        assert isinstance(seconds, float)
        return [seconds]
    now, call = clock.now, run.call
    times = []
    for _ in range(calls):
        start = now()
        call()
        times.append(now() - start)
    return times


def _calls(seconds: float, call: float) -> int:
    return min(TURN_CALLS, int(seconds / call)) if call > 0 else TURN_CALLS


def measure(
    runs: Sequence[Run],
    *,
    seconds: float = 2.0,
    rounds: int | None = None,
    min_rounds: int = 3,
    clock: Clock | None = None,
    on_round: Callable[[int, float], None] | None = None,
) -> list[Timing]:
    """Time all runs in interleaved rounds.

    Parameters
    ----------
    runs
        What takes turns; the round begins with another one each time.
    seconds
        Rounds begin until this much time has gone, but min_rounds at least.
    rounds
        A fixed number instead.
    clock
        Where time comes from.
    on_round
        Called after each round with the number of rounds and the seconds so far.

    Returns
    -------
    A timing a run, in their order.
    """
    clock = clock or Clock()
    timings = []
    warm: list[int] = []
    for run in runs:
        settle(clock)
        if run.self_timed:
            timings.append(Timing(run.name, 1))
            warm.append(0)
            continue
        start = clock.now()
        run.call()
        first = clock.now() - start
        if first < WARM_SECONDS:
            # The first call may have built plans, faulted pages in, woken threads.
            first = min(_turn(run, 2, clock))
        timings.append(Timing(run.name, max(1, _calls(TURN_SECONDS, first))))
        warm.append(_calls(WARM_SECONDS, first))
    begun = clock.now()
    done = 0
    while runs:
        for i in range(len(runs)):
            at = (i + done) % len(runs)
            settle(clock)
            for _ in range(warm[at]):
                runs[at].call()
            times = _turn(runs[at], timings[at].calls, clock)
            timings[at].rounds.append(statistics.median(times))
            timings[at].best = min(timings[at].best, *times)
        done += 1
        elapsed = clock.now() - begun
        if on_round is not None:
            on_round(done, elapsed)
        if done >= rounds if rounds is not None else done >= min_rounds and elapsed >= seconds:
            break
    return timings


def median_ratio(timing: Timing, baseline: Timing) -> float:
    """Return the median over the rounds of timing's time by baseline's in the same round."""
    return statistics.median(
        mine / other for mine, other in zip(timing.rounds, baseline.rounds, strict=True)
    )
