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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import mixedkv as mkv

from .. import models
from ..progress import SILENT, Progress
from . import llama, runs, windows
from .configurations import config_of, sized
from .measures import Figures, TokenFigures, compare, summarise
from .session import Settings, check_settings, f16_options, gguf_file, load, versions
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
    evaluation = _Evaluation(settings, loaded, cut, progress)
    try:
        evaluation.all()
    finally:
        evaluation.close()
    return dataclasses.replace(evaluation.result(settings), seconds=time.perf_counter() - begun)


@contextmanager
def attention_of_torch(model: Any) -> Iterator[None]:
    """Let the model attend by torch's own attention for a while."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("mixedkv")


@dataclass
class _Run:
    """A run under way, through caches made anew for each window."""

    name: str
    options: dict[str, Any]
    make: Callable[[], runs.StepCache | _Llama]
    scored: list[TokenFigures] = field(default_factory=list)
    stats: mkv.CacheStats | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Llama:
    """A cache of llama.cpp's to feed a window through."""

    model: llama.Model
    kind: str


@dataclass(frozen=True)
class _LlamaRuns:
    """llama.cpp's runs, f16 first; exact: the figures of that one against itself."""

    model: llama.Model
    runs: list[_Run]
    exact: list[TokenFigures] = field(default_factory=list)


def _llama_runs(settings: Settings) -> _LlamaRuns:
    model = llama.Model(gguf_file(settings), mkv.get_num_threads())

    def run(kind: str) -> _Run:
        return _Run(f"llama.cpp {kind}", {"type": kind}, lambda: _Llama(model, kind))

    kinds = ["f16", *(kind for kind in dict.fromkeys(settings.llama) if kind != "f16")]
    return _LlamaRuns(model, [run(kind) for kind in kinds])


class _Evaluation:
    """All runs over all windows."""

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
        self.llama = _llama_runs(settings) if settings.llama else None
        self.done = 0

    def close(self) -> None:
        """Give memory back that Python does not look after."""
        if self.llama is not None:
            self.llama.model.close()

    def _real(self, name: str, options: dict[str, Any]) -> _Run:
        config = self.loaded.model.config
        return _Run(name, options, lambda: runs.RealCache(config, options))

    def _simulated(self, name: str, options: dict[str, Any]) -> _Run:
        layers = self.loaded.model.config.get_text_config().num_hidden_layers
        rules = Rules.of(config_of(options))
        return _Run(f"{name}, simulated", options, lambda: SimulatedCache(layers, rules))

    def all(self) -> None:
        """Run and score everything."""
        count = len(self.cut.tokens)
        every = [self.f16, *self.caches, *self.simulations]
        runs_of_llama = self.llama.runs if self.llama is not None else []
        fed = count * (len(every) + len(runs_of_llama)) * (self.context - 1)
        self.progress.phase(f"{count} windows of {self.context} tokens", fed)
        for number, (inputs, targets) in enumerate(self.cut, 1):
            label = f"window {number} of {count}"
            exact = torch.cat([part for _, part in self._feed(self.f16, inputs, fed, label)])
            self.f16.scored.append(compare(exact, exact, targets))
            for run in self.caches:
                self._score(run, inputs, targets, exact, fed, label)
            with attention_of_torch(self.loaded.model):
                for run in self.simulations:
                    self._score(run, inputs, targets, exact, fed, label)
            if self.llama is not None:
                self._score_llama(self.llama, inputs, targets, exact, fed, label)

    def _score_llama(
        self,
        of_llama: _LlamaRuns,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        exact: torch.Tensor,
        fed: int,
        label: str,
    ) -> None:
        of_f16, *others = of_llama.runs
        own = torch.cat([part for _, part in self._feed(of_f16, inputs, fed, label)])
        own = own[:, : exact.shape[1]]
        of_f16.scored.append(compare(exact, own, targets))
        of_llama.exact.append(compare(own, own, targets))
        for run in others:
            self._score(run, inputs, targets, own, fed, label)

    def _score(
        self,
        run: _Run,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        exact: torch.Tensor,
        fed: int,
        label: str,
    ) -> None:
        parts = []
        for at, logits in self._feed(run, inputs, fed, label):
            rows = slice(at, at + len(logits))
            parts.append(compare(exact[rows], logits[:, : exact.shape[1]], targets[rows]))
        run.scored.append(TokenFigures.join(parts))

    def _feed(
        self, run: _Run, inputs: torch.Tensor, total: int, label: str
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Give logits of scored predictions, and the index of the first of them."""
        begun, before = time.perf_counter(), self.done
        first = self.cut.prompt - 1
        step_cache = run.make()
        if isinstance(step_cache, _Llama):
            steps = step_cache.model.feed(inputs, first, step_cache.kind)
        else:
            steps = runs.feed(self.loaded.model, inputs, step_cache, first)
        for fed, logits in steps:
            self.done = before + fed
            self.progress.at(self.done, total, f"{label}: {run.name}")
            if len(logits):
                yield fed - first - len(logits), logits
        run.seconds += time.perf_counter() - begun
        if isinstance(step_cache, runs.RealCache):
            run.stats = step_cache.cache.stats()

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
            + self._llama_figures(),
            seconds=0.0,
        )

    def _llama_figures(self) -> list[CacheFigures]:
        if self.llama is None:
            return []
        stats = self.f16.stats
        assert stats is not None
        found = []
        for number, run in enumerate(self.llama.runs):
            bits = llama.bits_of(run.options["type"])
            held = stats.hot_tokens * (stats.hot_bytes // stats.hot_size)
            base = self.llama.exact if number else self.f16.scored
            found.append(
                CacheFigures(
                    name=run.name,
                    options=run.options,
                    cold_bits=bits if number else None,
                    total_bytes=int(held * bits / 16),
                    f16_share=bits / 16,
                    hot_tokens=0,
                    cold_tokens=stats.hot_tokens,
                    events=0,
                    seconds=run.seconds,
                    figures=summarise(run.scored, base, BLOCK),
                    simulated=None,
                )
            )
        return found

    def _figures(self, run: _Run, simulation: _Run | None) -> CacheFigures:
        stats, f16 = run.stats, self.f16.stats
        assert stats is not None
        assert f16 is not None
        f16_token_bytes = f16.hot_bytes // f16.hot_size
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
