"""What all of an evaluation's runs share: settings, the model, and what can't be is refused."""

# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mixedkv as mkv
import mixedkv.integrations.transformers as mkt
from mixedkv._options import size

from .. import models
from .._commands import MOST_SEED
from ..memory import padded
from ..progress import Progress
from . import llama
from .configurations import Configuration, config_of, sized

MOST_TOKENS = 2**30
"""More than any text has; a cache's sizes end a little above it."""

MOST_FACTS = 16
"""In one text: there are no more places that they tell of."""


@dataclass(frozen=True)
class Settings:
    """What to run. Sizes are in tokens.

    Attributes
    ----------
    configurations
        The caches to compare with the f16 one.
    model
        As `models.load` takes it; None: SmolLM2-135M-Instruct.
    text
        None: the prose that every Python carries.
    tokens
        Predictions to score, in whole windows.
    context, prompt
        Tokens of a window, and those at its start that are read and not scored; None: half.
    simulate
        Run each cache's simulation in plain torch besides.
    llama
        Types of llama.cpp's own cache to run the same tokens through; the model is a GGUF file.
    facts, texts, seed
        Of the retrieval check: facts in a text of `context` tokens, such texts, and what numbers
        and places come from.
    """

    configurations: list[Configuration]
    model: str | None = None
    text: Path | None = None
    tokens: int = 8192
    context: int = 2048
    prompt: int | None = None
    simulate: bool = False
    llama: tuple[str, ...] = ()
    facts: int = 8
    texts: int = 4
    seed: int = 0
    cache_dir: Path | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens at a window's start that are not scored."""
        return self.context // 2 if self.prompt is None else self.prompt


def check_settings(settings: Settings) -> None:
    """Refuse what no model can be run with, before one is fetched; ValueError tells what."""
    for name, least, most in (
        ("context", 2, MOST_TOKENS),
        ("tokens", 1, MOST_TOKENS),
        ("facts", 1, MOST_FACTS),
        ("texts", 1, MOST_TOKENS),
        ("seed", 0, MOST_SEED),
    ):
        size(getattr(settings, name), name, least, most)
    if settings.prompt is not None:
        size(settings.prompt, "prompt", 1, settings.context - 1)
    for configuration in settings.configurations:
        try:
            sizes = sized(configuration.options, settings.context)
            mkv.MixedKVCache(config_of(sizes))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"configuration {configuration.name!r}: {error}") from error
    for kind in settings.llama:
        llama.check_type(kind)
    model = settings.model
    if settings.llama and model is not None and not Path(model).is_file():
        raise ValueError(f"llama.cpp runs GGUF files only, and model is {model!r}")


def load(settings: Settings, progress: Progress) -> models.LoadedModel:
    """Fetch and load the model, and check that the context fits it."""
    mkt.register()
    progress.phase("fetching the model")
    fetched = None
    if settings.model is None:
        fetched = models.fetch(folder=settings.cache_dir, progress=progress)
    progress.phase("loading the model")
    loaded = models.load(settings.model, fetched=fetched)
    config = loaded.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and settings.context > positions:
        raise ValueError(
            f"context must be at most the {positions} positions of {loaded.title}, "
            f"got {settings.context}"
        )
    return loaded


def f16_options(context: int) -> dict[str, Any]:
    """Give the options of a cache that keeps everything in f16."""
    return {"quantize": False, "hot_size": padded(context)}


def versions() -> dict[str, Any]:
    """Give what figures depend on beside the settings, for JSON."""
    return {
        "mixedkv": mkv.__version__,
        "isa": mkv.isa.active(),
        "threads": mkv.get_num_threads(),
    }
