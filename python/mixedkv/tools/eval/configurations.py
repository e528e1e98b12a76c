"""Configurations of caches, as a command line names them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mixedkv as mkv
import mixedkv.integrations.transformers as mkt
from mixedkv.cache import presets
from mixedkv.cache.config import OPTIONS
from mixedkv.integrations.transformers.options import TAKEN

from ..memory import padded

_DEFAULTS: dict[str, Any] = {name: OPTIONS[name].default for name in TAKEN}
_KINDS = {bool: "1 or 0", int: "a whole number", float: "a number"}
_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class Configuration:
    """A cache to try.

    Attributes
    ----------
    name
        What to call it.
    given
        Options of `mixedkv.integrations.transformers.MixedCache`.
    preset
        What they change.
    """

    name: str
    given: dict[str, Any]
    preset: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those of the preset included, as they are for a model without sliding windows."""
        return self.given if self.preset is None else presets.options(self.preset, **self.given)

    def for_model(self, config: Any) -> dict[str, Any]:
        """Give all options, as a MixedCache of the model has them."""
        return mkt.preset_options(config, self.preset, **self.given)


def parse(text: str) -> Configuration:
    """Read ``preset``, ``option=value ...`` or ``name: preset option=value ...``.

    A word without = is the name of a preset, whose options come first; lists of options may be
    parted by spaces or commas. Where no name is given, the text itself is the name.

    Raises
    ------
    ValueError
        Naming what can't be read.
    """
    name, colon, rest = text.partition(":")
    words = re.split(r"[\s,]+", (rest if colon else text).strip())
    named: list[str] = []
    given: dict[str, Any] = {}
    for word in filter(None, words):
        option, equals, value = word.partition("=")
        if not equals:
            presets.check(word)
            named.append(word)
        else:
            given[option] = _value(option, value)
    if not named and not given:
        raise ValueError(f"a configuration has a preset or options, got {text!r}")
    if len(named) > 1:
        raise ValueError(f"a configuration has one preset at most, got {' and '.join(named)}")
    return Configuration(
        " ".join((name if colon else text).split()), given, named[0] if named else None
    )


def parse_all(texts: Sequence[str]) -> list[Configuration]:
    """Read several; their names must differ. None given: every preset."""
    found = [parse(text) for text in texts or presets.NAMES]
    names = [configuration.name for configuration in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two configurations have the name {name!r}")
    return found


def _value(name: str, text: str) -> Any:
    if name not in _DEFAULTS:
        raise ValueError(f"there is no option {name!r}; there are {', '.join(_DEFAULTS)}")
    kind = type(_DEFAULTS[name])
    try:
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {text!r}") from None


def config_of(options: dict[str, Any]) -> mkv.CacheConfig:
    """Give the configuration of a small cache with these options."""
    return mkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=64, **options)


def sized(options: dict[str, Any], context: int) -> dict[str, Any]:
    """Give options with a cold tier for so many tokens, where they say nothing of its size."""
    config = config_of(options)
    if "cold_size" in options or not config.quantize:
        return options
    level = math.floor(config.threshold * config.hot_size)
    return {**options, "cold_size": padded(max(context - level, 1), config.n_pad)}
