"""What caches cost in quality: one model, one text, an f16 cache beside any number of others.

All caches are fed the same tokens (teacher forcing). Window by window, the f16 run comes first and
its logits are kept, then every other run is compared with it as its logits come: nothing else is
held, whatever the number of caches.

Needs the extra ``mixedkv[demo]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import mixedkv as mkv

from .. import models
from ..llama import loaded_model
from ..progress import SILENT, Progress
from . import llama, runs, windows
from .configurations import config_of, sized
from .measures import Figures, TokenFigures, compare, summarise
from .session import Settings, check_settings, f16_options, load, versions
from .simulate import Rules, SimulatedCache

BLOCK = 128
"""Consecutive tokens whose mean is one draw of those that standard errors come from."""


@dataclass(frozen=True)
class CacheFigures:
    """What one cache came to.

    Attributes
    ----------
    options
        Of a `MixedCache`; of llama.cpp's, its type alone.
    cold_bits
        Bits that the cold tier takes for a value, scales and centers included; None: there is none.
    total_bytes
        All that the cache holds at the end of a window, books included.
    f16_share
        That over what the same tokens take in f16.
    hot_tokens, cold_tokens, events
        At the end of a window, and the batches of moves until then.
    figures
        Against the f16 run; of a quantised cache of llama.cpp's, against llama.cpp's own f16 run.
    simulated
        The same of a simulation in plain torch, where one was asked for.
    """

    name: str
    options: dict[str, Any]
    cold_bits: float | None
    total_bytes: int
    f16_share: float
    hot_tokens: int
    cold_tokens: int
    events: int
    seconds: float
    figures: Figures
    simulated: Figures | None


@dataclass(frozen=True)
class Result:
    """What an evaluation found; `f16` is the run that all others are compared with."""

    title: str
    text: str
    tokens: int
    windows: int
    context: int
    prompt: int
    f16: CacheFigures
    caches: list[CacheFigures]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        found = dataclasses.asdict(self)
        return {**versions(), "model": found.pop("title"), **found}


def run(settings: Settings, progress: Progress = SILENT) -> Result:
    """Evaluate caches.

    Raises
    ------
    ValueError
        The settings ask for more than the model or the text has, or an option is wrong.
    models.ModelError
        The model could not be fetched or loaded.
    """
    begun = time.perf_counter()
    check_settings(settings)
    text = windows.read(settings.text)
    loaded = load(settings, progress)
    cut = windows.cut(
        text, loaded.tokenizer, settings.context, settings.prompt_tokens, settings.tokens
    )
    with ExitStack() as stack:
        evaluation = _Evaluation(settings, loaded, cut, progress)
        if settings.llama:
            assert loaded.file is not None  # check_settings saw to that
            evaluation.add_llama(stack.enter_context(loaded_model(loaded.file)), settings.llama)
        evaluation.all()
    return dataclasses.replace(evaluation.result(settings), seconds=time.perf_counter() - begun)


@contextmanager
def attention_of_torch(model: Any) -> Iterator[None]:
    """Let the model attend by torch's own attention for a while."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("mixedkv")


Feed = Callable[[torch.Tensor, int], Iterator[tuple[int, torch.Tensor]]]
"""Feeds tokens [n] through a cache made anew, and gives logits as `runs.feed` does, of tokens from
an index on."""


@dataclass
class _Run:
    """A run under way."""

    name: str
    options: dict[str, Any]
    feed: Feed
    scored: list[TokenFigures] = field(default_factory=list)
    stats: mkv.CacheStats | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Window:
    """What a window's runs have in common."""

    inputs: torch.Tensor
    targets: torch.Tensor
    label: str


class _Evaluation:
    """All runs over all windows.

    Attributes
    ----------
    llama
        llama.cpp's runs, f16 first.
    llama_exact
        The figures of that one against itself, which the others are compared with.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: models.LoadedModel,
        cut: windows.Windows,
        progress: Progress,
    ) -> None:
        self.loaded, self.cut, self.progress = loaded, cut, progress
        self.context = settings.context
        self.f16 = self._real("f16", f16_options(self.context))
        self.caches: list[_Run] = []
        self.simulations: list[_Run] = []
        for configuration in settings.configurations:
            options = sized(configuration.for_model(loaded.model.config), self.context)
            self.caches.append(self._real(configuration.name, options))
            if settings.simulate:
                self.simulations.append(self._simulated(configuration.name, options))
        self.llama: list[_Run] = []
        self.llama_exact: list[TokenFigures] = []
        self.done = self.total = 0

    def add_llama(self, model: Any, kinds: Sequence[str]) -> None:
        """Run caches of llama.cpp's besides, of its f16 and of these types."""
        threads = mkv.get_num_threads()
        for kind in dict.fromkeys(("f16", *kinds)):
            feed = partial(llama.feed, model, kind=kind, threads=threads)
            self.llama.append(_Run(f"llama.cpp {kind}", {"type": kind}, feed))

    def _real(self, name: str, options: dict[str, Any]) -> _Run:
        def feed(inputs: torch.Tensor, first: int) -> Iterator[tuple[int, torch.Tensor]]:
            model = self.loaded.model
            step_cache = runs.RealCache(model.config, options)
            yield from runs.feed(model, inputs, step_cache, first)
            real.stats = step_cache.cache.stats()

        real = _Run(name, options, feed)
        return real

    def _simulated(self, name: str, options: dict[str, Any]) -> _Run:
        model = self.loaded.model
        layers = model.config.get_text_config().num_hidden_layers
        rules = Rules.of(config_of(options))

        def feed(inputs: torch.Tensor, first: int) -> Iterator[tuple[int, torch.Tensor]]:
            return runs.feed(model, inputs, SimulatedCache(layers, rules), first)

        return _Run(f"{name}, simulated", options, feed)

    def all(self) -> None:
        """Run and score everything."""
        count = len(self.cut.tokens)
        every = [self.f16, *self.caches, *self.simulations, *self.llama]
        self.total = count * len(every) * (self.context - 1)
        self.progress.phase(f"{count} windows of {self.context} tokens", self.total)
        for number, (inputs, targets) in enumerate(self.cut, 1):
            window = _Window(inputs, targets, f"window {number} of {count}")
            exact = self._logits(self.f16, window)
            self.f16.scored.append(compare(exact, exact, targets))
            for run in self.caches:
                self._score(run, window, exact)
            with attention_of_torch(self.loaded.model):
                for run in self.simulations:
                    self._score(run, window, exact)
            if self.llama:
                of_f16, *others = self.llama
                # A GGUF file may have a vocabulary padded to a round number.
                own = self._logits(of_f16, window)[:, : exact.shape[1]]
                of_f16.scored.append(compare(exact, own, targets))
                self.llama_exact.append(compare(own, own, targets))
                for run in others:
                    self._score(run, window, own)

    def _logits(self, run: _Run, window: _Window) -> torch.Tensor:
        """Give the logits of all scored predictions."""
        return torch.cat([logits for _, logits in self._feed(run, window)])

    def _score(self, run: _Run, window: _Window, exact: torch.Tensor) -> None:
        parts = []
        for at, logits in self._feed(run, window):
            rows = slice(at, at + len(logits))
            parts.append(compare(exact[rows], logits[:, : exact.shape[1]], window.targets[rows]))
        run.scored.append(TokenFigures.join(parts))

    def _feed(self, run: _Run, window: _Window) -> Iterator[tuple[int, torch.Tensor]]:
        """Give logits of scored predictions, and the index of the first of them."""
        begun, before = time.perf_counter(), self.done
        first = self.cut.prompt - 1
        for fed, logits in run.feed(window.inputs, first):
            self.done = before + fed
            self.progress.at(self.done, self.total, f"{window.label}: {run.name}")
            if len(logits):
                yield fed - first - len(logits), logits
        run.seconds += time.perf_counter() - begun

    def result(self, settings: Settings) -> Result:
        """Sum everything up."""
        simulations: list[_Run | None] = [*self.simulations] or [None] * len(self.caches)
        return Result(
            title=self.loaded.title,
            text=windows.title(settings.text),
            tokens=self.cut.scored,
            windows=len(self.cut.tokens),
            context=self.context,
            prompt=self.cut.prompt,
            f16=self._figures(self.f16, None),
            caches=[
                self._figures(run, simulation)
                for run, simulation in zip(self.caches, simulations, strict=True)
            ]
            + [self._llama_figures(run) for run in self.llama],
            seconds=0.0,
        )

    @property
    def _f16_token_bytes(self) -> int:
        """Bytes that a token takes in f16."""
        stats = self.f16.stats
        assert stats is not None
        return stats.hot_bytes // stats.hot_size

    def _llama_figures(self, run: _Run) -> CacheFigures:
        bits = llama.bits_of(run.options["type"])
        is_f16 = run is self.llama[0]
        held = self.context - 1
        return CacheFigures(
            name=run.name,
            options=run.options,
            cold_bits=None if is_f16 else bits,
            total_bytes=int(held * self._f16_token_bytes * bits / 16),
            f16_share=bits / 16,
            hot_tokens=0,
            cold_tokens=held,
            events=0,
            seconds=run.seconds,
            figures=summarise(run.scored, self.f16.scored if is_f16 else self.llama_exact, BLOCK),
            simulated=None,
        )

    def _figures(self, run: _Run, simulation: _Run | None) -> CacheFigures:
        stats, f16_token_bytes = run.stats, self._f16_token_bytes
        assert stats is not None
        values = f16_token_bytes / 2 * stats.cold_size
        held = stats.hot_tokens + stats.cold_tokens
        return CacheFigures(
            name=run.name,
            options=run.options,
            cold_bits=8 * stats.cold_bytes / values if values else None,
            total_bytes=stats.total_bytes,
            f16_share=stats.total_bytes / (held * f16_token_bytes),
            hot_tokens=stats.hot_tokens,
            cold_tokens=stats.cold_tokens,
            events=stats.events,
            seconds=run.seconds,
            figures=summarise(run.scored, self.f16.scored, BLOCK),
            simulated=None
            if simulation is None
            else summarise(simulation.scored, self.f16.scored, BLOCK),
        )
