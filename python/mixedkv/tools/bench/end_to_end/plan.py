"""What an end-to-end run consists of, and running it.

A cell is a length of the context and a number of threads; it makes one table. All contenders read
the same text and are then fed its next tokens, one a step, so that all do the same work and their
predictions can be compared.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import mixedkv as mkv

from ... import evaluate, texts
from ...progress import SILENT, Progress
from .. import results
from ..load import OthersLoad
from ..results import faster, machine
from ..timing import Run, Timing, measure, median_ratio
from .contenders import REFERENCE, Contender, Field
from .stopwatch import Stopwatch

#: Untimed decode steps between prefill and decoding, after which predictions are compared.
CHECKED_STEPS = 8
#: Tokens that every contender reads once before anything is timed, and steps after them: libraries
#: compile, allocate and start threads at their first use.
_WARM_TOKENS = 32
_WARM_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """What to run."""

    #: Tokens that a decode step attends over, up to the model's last position.
    contexts: Sequence[int]
    threads: Sequence[int]
    #: Turns of decoding, and steps of a turn.
    rounds: int
    steps: int
    #: Time that the rounds of a cell's prefill may take; one round at least.
    seconds: float
    #: Most tokens of a forward; None: the whole prompt in one.
    prefill_chunk: int | None

    @property
    def fed(self) -> int:
        """Tokens that are fed after the prompt."""
        return CHECKED_STEPS + self.rounds * self.steps

    def prompt(self, context: int, positions: int) -> int:
        """Return the prompt's length: the context, or what leaves positions for the tokens fed."""
        prompt = min(context, positions - self.fed)
        if context > positions or prompt < 1:
            raise ValueError(
                f"a context of {context} tokens and {self.fed} steps: the model has {positions} "
                "positions"
            )
        return prompt


@dataclass(kw_only=True)
class Row(results.Row):
    """One contender in one cell; `ratio` is that of its decoding."""

    #: transformers' name of the attention.
    implementation: str
    #: Decode steps a second, moves and requantising included: steps by the time of all of them.
    tokens_per_second: float | None = None
    #: A decode step: median, shortest, mean.
    step: float | None = None
    step_best: float | None = None
    step_mean: float | None = None
    #: What a step spends in the cache and in attention, and elsewhere: medians, and the mean.
    attention: float | None = None
    attention_mean: float | None = None
    rest: float | None = None
    #: Reading the prompt, likewise: median over the rounds.
    prefill: float | None = None
    prefill_ratio: float | None = None
    prefill_attention: float | None = None
    prefill_rest: float | None = None
    #: Predictions of the decode steps against the reference's: mean KL divergence in nats, share
    #: of equal top tokens, and how many there were.
    kl: float | None = None
    top1: float | None = None
    compared: int = 0


@dataclass(kw_only=True)
class Table(results.Table[Row]):
    """One cell; `rounds` and `faster` are those of decoding."""

    context: int
    prompt: int
    prefill_rounds: int = 0
    #: Of a round of decoding.
    steps: int = 0
    #: Who read the prompt faster than mixedkv's mixed cache; the fastest first.
    prefill_faster: list[results.Faster] = field(default_factory=list)

    @property
    def subject(self) -> str:
        """What it is of, in words."""
        return f"context {self.context}"


@dataclass(kw_only=True)
class Report(results.Report[Table]):
    """Everything that a run found."""

    model: dict[str, Any]
    task: str = "end-to-end"


def positions_of(model: Any) -> int:
    """Return how many positions a model was made for."""
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


def text_of(tokenizer: Any, plan: Plan, positions: int) -> torch.Tensor:
    """Return prose as long as a plan needs, [1, n]: repeated where it is too short."""
    needed = max(plan.prompt(context, positions) for context in plan.contexts) + plan.fed
    ids: torch.Tensor = tokenizer(texts.library_prose(), return_tensors="pt").input_ids
    return ids.repeat(1, -(-needed // ids.shape[1]))[:, :needed]


class Session:
    """One contender in one cell: its cache, and what its steps took."""

    def __init__(
        self, contender: Contender, model: Any, ids: torch.Tensor, prompt: int, plan: Plan
    ) -> None:
        self.contender = contender
        self.row = Row(
            peer=contender.peer, name=contender.name, implementation=contender.implementation
        )
        self.prefill_attention: list[float] = []
        self.steps: list[float] = []
        self.attention: list[float] = []
        self.logits: list[torch.Tensor] = []
        self._model = model
        self._ids = ids
        self._prompt = prompt
        self._plan = plan
        self._stopwatch = Stopwatch()
        self._cache: Any = None
        self._at = 0

    def attempt(self, step: Callable[[], float]) -> float:
        """Return what a step of this session's returns, NaN where it fails or one failed before.

        Whatever a library throws is its own affair: it goes into the row, and others go on.
        """
        if self.row.problem is not None:
            return math.nan
        try:
            return step()
        except Exception as error:
            self.row.fail(error)
            return math.nan

    def warm(self) -> float:
        """Run everything once on a few tokens."""
        self._read(min(_WARM_TOKENS, self._prompt))
        self.feed(_WARM_STEPS)
        self._cache = None
        return 0.0

    def check(self) -> float:
        """Feed the tokens after which predictions are compared."""
        self.feed(CHECKED_STEPS)
        return 0.0

    def prefill(self) -> float:
        """Read the prompt into a new cache; return the seconds."""
        seconds, attention = self._read(self._prompt)
        self.prefill_attention.append(attention)
        return seconds

    def turn(self) -> float:
        """Decode a round's steps; return the mean seconds of one."""
        steps, attention = self.feed(self._plan.steps)
        self.steps += steps
        self.attention += attention
        return statistics.fmean(steps)

    def feed(self, count: int) -> tuple[list[float], list[float]]:
        """Feed the next tokens, one a step; return each step's seconds and attention's part."""
        steps, attention = [], []
        with self._watching():
            for _ in range(count):
                token = self._ids[:, self._at : self._at + 1]
                self._stopwatch.take()
                start = time.perf_counter()
                logits = self._forward(token)
                steps.append(time.perf_counter() - start)
                attention.append(self._stopwatch.take())
                self.logits.append(logits[0, -1].clone())
        return steps, attention

    def _read(self, prompt: int) -> tuple[float, float]:
        self._cache, self._at = None, 0  # the old one goes before the new one comes
        self.logits.clear()
        self._cache = self.contender.make_cache(prompt + self._plan.fed)
        chunk = self._plan.prefill_chunk or prompt
        with self._watching():
            self._stopwatch.take()
            start = time.perf_counter()
            for first in range(0, prompt, chunk):
                self._forward(self._ids[:, first : min(first + chunk, prompt)])
            return time.perf_counter() - start, self._stopwatch.take()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self._model.set_attn_implementation(self.contender.implementation)
        with (
            torch.no_grad(),
            self._stopwatch.watching(self.contender.implementation, self._cache),
        ):
            yield

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        self._at += ids.shape[1]
        logits: torch.Tensor = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def compare(self, reference: Session) -> None:
        """Compare the predictions so far with the reference's; mark the row where they are off."""
        found = evaluate.compare_logits(torch.stack(reference.logits), torch.stack(self.logits))
        self.row.kl, self.row.top1, self.row.compared = found.kl_mean, found.top1, found.tokens
        # The comparison is this way round for the sake of NaN.
        if not found.kl_mean <= self.contender.most_kl:
            self.row.problem = f"wrong: KL divergence above {self.contender.most_kl:g}"


def run(
    plan: Plan,
    title: str,
    model: Any,
    ids: torch.Tensor,
    contenders: Field,
    progress: Progress = SILENT,
) -> Report:
    """Run a plan with a model of transformers in eval mode, called `title` in print.

    Raises
    ------
    ValueError
        The model has too few positions, or the text too few tokens, for a context of the plan.
    """
    positions = positions_of(model)
    prompts = [plan.prompt(context, positions) for context in plan.contexts]
    if max(prompts) + plan.fed > ids.shape[1]:
        raise ValueError(f"the text has {ids.shape[1]} tokens, needed {max(prompts) + plan.fed}")
    report = Report(
        machine={**machine(), "torch": torch.__version__},
        model={
            "title": title,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "positions": positions,
        },
        peers=contenders.versions,
        absent=contenders.absent,
    )
    before = torch.get_num_threads(), mkv.get_num_threads(), model.config._attn_implementation
    try:
        for context, prompt in zip(plan.contexts, prompts, strict=True):
            for threads in plan.threads:
                table = Table(context=context, prompt=prompt, threads=threads)
                report.tables.append(table)
                torch.set_num_threads(threads)
                mkv.set_num_threads(threads)
                sessions = [
                    Session(contender, model, ids, prompt, plan)
                    for contender in contenders.contenders
                ]
                _run_cell(plan, table, sessions, progress)
                del sessions
                gc.collect()
    finally:
        torch.set_num_threads(before[0])
        mkv.set_num_threads(before[1])
        model.set_attn_implementation(before[2])
    return report


def _run_cell(plan: Plan, table: Table, sessions: list[Session], progress: Progress) -> None:
    progress.phase(table.title)
    table.rows = [session.row for session in sessions]
    for i, session in enumerate(sessions):
        progress.at(i, len(sessions), f"warming up {session.contender.name}")
        session.attempt(session.warm)
    load = OthersLoad()
    prefills = _prefill(plan, table, _sound(sessions), progress)
    for i, session in enumerate(_sound(sessions)):
        progress.at(i, len(sessions), f"checking {session.contender.name}")
        session.attempt(session.check)
    _compare(_sound(sessions))  # who is wrong is not timed
    decodes = _decode(plan, table, _sound(sessions), progress)
    table.others_load = load.cpus()
    racing = _sound(sessions)
    _compare(racing)
    for session in racing:
        _fill(session, racing[0], prefills, decodes)
    table.faster = faster((row, row.ratio) for row in table.rows)
    table.prefill_faster = faster((row, row.prefill_ratio) for row in table.rows)


def _sound(sessions: Sequence[Session]) -> list[Session]:
    return [session for session in sessions if session.row.problem is None]


def _compare(sessions: Sequence[Session]) -> None:
    """Hold predictions against the reference's, who must be able to run the model."""
    references = [one for one in sessions if one.contender.name == REFERENCE]
    if not references:
        raise RuntimeError(f"{REFERENCE} could not run this model, and the others have no measure")
    for session in sessions:
        if session is not references[0]:
            session.compare(references[0])


def _prefill(
    plan: Plan, table: Table, sessions: Sequence[Session], progress: Progress
) -> dict[str, Timing]:
    progress.at(0, 1, "prefill")
    if sessions:
        # The first forward of this length makes the process grow: nobody's affair.
        sessions[0].attempt(sessions[0].prefill)
        sessions[0].prefill_attention.clear()
    timings = measure(
        [_timed(one, one.prefill) for one in sessions],
        seconds=plan.seconds,
        min_rounds=1,
        on_round=lambda done, elapsed: progress.at(
            min(elapsed, plan.seconds), plan.seconds or 1, f"prefill, round {done}"
        ),
    )
    table.prefill_rounds = len(timings[0].rounds) if timings else 0
    return {timing.name: timing for timing in timings}


def _decode(
    plan: Plan, table: Table, sessions: Sequence[Session], progress: Progress
) -> dict[str, Timing]:
    progress.at(0, plan.rounds, "decoding")
    timings = measure(
        [_timed(one, one.turn) for one in sessions],
        rounds=plan.rounds,
        on_round=lambda done, _: progress.at(done, plan.rounds, f"decoding, round {done}"),
    )
    table.rounds, table.steps = plan.rounds, plan.steps
    return {timing.name: timing for timing in timings}


def _timed(session: Session, step: Callable[[], float]) -> Run:
    return Run(session.contender.name, partial(session.attempt, step), self_timed=True)


def _fill(
    session: Session, first: Session, prefills: dict[str, Timing], decodes: dict[str, Timing]
) -> None:
    row, name = session.row, session.contender.name
    row.prefill = prefills[name].median
    row.prefill_attention = statistics.median(session.prefill_attention)
    row.prefill_rest = _rest(prefills[name].rounds, session.prefill_attention)
    row.step = statistics.median(session.steps)
    row.step_best = min(session.steps)
    row.step_mean = statistics.fmean(session.steps)
    row.tokens_per_second = 1 / row.step_mean
    row.attention = statistics.median(session.attention)
    row.attention_mean = statistics.fmean(session.attention)
    row.rest = _rest(session.steps, session.attention)
    if first.contender.peer == "mixedkv":  # its mixed cache, or nobody where that is missing
        row.against = against = first.contender.name
        row.ratio = median_ratio(decodes[name], decodes[against])
        row.prefill_ratio = median_ratio(prefills[name], prefills[against])


def _rest(wholes: Sequence[float], parts: Sequence[float]) -> float:
    return statistics.median(a - b for a, b in zip(wholes, parts, strict=True))
