"""The options of the caches: names, types, defaults and meanings, a line each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Concatenate,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeVar,
    get_args,
    get_type_hints,
)

import numpy as np

from .. import _core
from .._arrays import boolean
from .._options import finite, window
from .arguments import integer, kv_type, layers, positive, positive_or_none

Check = Callable[[Any, str], Any]


def later(value: Any, name: str) -> NoReturn:
    """Refuse an option that has no meaning yet; its default never comes here."""
    default = OPTIONS[name].default
    raise NotImplementedError(f"{name} is not there yet: it must be {default}, got {value}")


def _window(value: Any, name: str) -> int:
    return window(value)


def _is(value: Any, default: Any) -> bool:
    """Whether an option has its default, whatever may have been given, arrays too."""
    return value is default or (np.ndim(value) == 0 and bool(value == default))


def _as_given(value: Any, name: str) -> Any:
    return value


# An option's type, and what returns its value, or refuses it by the option's name.
Count = Annotated[int, positive]
Int = Annotated[int, integer]
Size = Annotated[int | None, positive_or_none]
Share = Annotated[float, finite]
Type = Annotated[str, kv_type]
Window = Annotated[int, _window]
Layers = Annotated[Callable[[int], bool] | Iterable[int] | None, _as_given]
Switch = Annotated[bool, boolean]


# What the core has a field for stands in the core's order (include/mixedkv/cache_config.h).
@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What a cache is made from; immutable.

    Types of keys and values are those of :mod:`mixedkv.formats`. Tokens move when more than
    ``floor(threshold * hot_size)`` hot cells are in use: ``min(used // 4, group_size)`` of them,
    oldest first, until that is so no longer. `layer_filter` may also be a callable on a layer's
    index; it is asked once, and the indices that it lets through are kept.

    `sink_tokens` and `hot_keep` hold for every sequence at every step, prompts longer than hot
    included; (sink_tokens + hot_keep) * n_seq_max must be below the level at which tokens move.

    `rotate`: a normalised Walsh-Hadamard transform of every row of K and V (and of queries, and
    back on what attention gives) spreads the few large values that models' keys have over all of
    head_dim, so that blocks with a scale of their own lose less. It is done by blocks of the
    largest power of two that divides head_dim: all 64, 128 or 256 values, 16 of 80, nothing of an
    odd head_dim. Both tiers hold rotated rows: results differ by rounding, and in what quantising
    loses. Off: the tiers hold the rows' own bytes, as ggml quantises them.

    An option that is wrong, by itself or beside the others, is refused here: ValueError and
    TypeError name the option and its value. `rope` is not there yet: anything but its default
    raises NotImplementedError.
    """

    num_layers: Annotated[Count, "Layers of the model."]
    num_kv_heads: Annotated[Count, "Heads of K and of V."]
    head_dim: Annotated[Count, "Values in a row of K, whole blocks of its types."]
    head_dim_v: Annotated[Size, "Values in a row of V, likewise; None: head_dim."] = None
    hot_size: Annotated[Count, "Hot cells (tokens), all sequences together."] = 1024
    cold_size: Annotated[Count, "Cold cells, likewise; none without quantize."] = 4096
    group_size: Annotated[Count, "Most tokens moved in one batch."] = 256
    threshold: Annotated[Share, "A move is due above floor(threshold * hot_size) hot cells."] = 0.8
    n_pad: Annotated[Count, "What both sizes are multiples of."] = 32
    n_seq_max: Annotated[Count, "Sequence ids are 0 to n_seq_max - 1."] = 1
    hot_k_type: Annotated[Type, "Type of hot keys."] = "f16"
    hot_v_type: Annotated[Type, "Type of hot values."] = "f16"
    cold_k_type: Annotated[Type, "Type of cold keys."] = "q4_0"
    cold_v_type: Annotated[Type, "Type of cold values."] = "q4_0"
    sink_tokens: Annotated[Int, "First positions of each sequence, which stay hot."] = 0
    hot_keep: Annotated[Int, "Newest positions of each sequence, which stay hot."] = 0
    rotate: Annotated[Switch, "Hold rows rotated (Hadamard), so that they quantise better."] = False
    window_left: Annotated[Window, "attend's default window; -1: none."] = -1
    rope: Annotated[None, later, "RoPE parameters, to shift stored keys by."] = None
    layer_filter: Annotated[Layers, "Indices of the layers to hold; None: all."] = None
    center_keys: Annotated[
        Switch, "Cold keys of quantised types: less a vector 128 cells share."
    ] = False
    fit_scales: Annotated[
        Switch, "Scales of q4_0 and iq4_nl by least squared error, not ggml's."
    ] = False
    quantize: Annotated[Switch, "Off: one tier, no moves; cold is not allocated."] = True

    def __post_init__(self) -> None:
        for option in sorted(OPTIONS.values(), key=lambda option: not option.is_later):
            value = getattr(self, option.name)
            if not option.is_later:
                object.__setattr__(self, option.name, option.check(value, option.name))
            elif not _is(value, option.default):
                option.check(value, option.name)
        layer_filter = self.layer_filter
        # All else first: the core bounds num_layers, which a list is made of.
        object.__setattr__(self, "layer_filter", None)
        _core.check_config(**core_options(self))
        held = layers(layer_filter, self.num_layers)
        indices = tuple(layer for layer, is_held in enumerate(held) if is_held)
        object.__setattr__(self, "layer_filter", indices or None)

    def replace(self, **changes: Any) -> CacheConfig:
        """Return a configuration with some options changed."""
        refuse_unknown(changes, "CacheConfig", OPTIONS)
        return dataclasses.replace(self, **changes)


class Option(NamedTuple):
    """One option, as :class:`CacheConfig` declares it; default is MISSING where there is none."""

    name: str
    type: Any
    default: Any
    check: Check
    meaning: str

    @property
    def is_later(self) -> bool:
        """Whether the option waits for its meaning, and the core does not know it."""
        return self.check is later

    def parameter(self) -> inspect.Parameter:
        """Return the option as a keyword of a signature."""
        default = inspect.Parameter.empty if self.default is dataclasses.MISSING else self.default
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=default, annotation=self.type)


def _declared() -> dict[str, Option]:
    hints = get_type_hints(CacheConfig, include_extras=True)
    options = {}
    for field in dataclasses.fields(CacheConfig):
        kind, check, meaning = get_args(hints[field.name])
        options[field.name] = Option(field.name, kind, field.default, check, meaning)
    return options


OPTIONS = _declared()


def _described() -> str:
    lines = ["", "    Parameters", "    ----------"]
    for option in OPTIONS.values():
        default = "" if option.default is dataclasses.MISSING else f" : default {option.default!r}"
        lines += [f"    {option.name}{default}", f"        {option.meaning}"]
    return "\n".join([*lines, "    "])


CacheConfig.__doc__ = (CacheConfig.__doc__ or "").rstrip() + "\n" + _described()


def core_options(config: CacheConfig) -> dict[str, Any]:
    """Return what the core's cache is made from."""
    options = {
        option.name: getattr(config, option.name)
        for option in OPTIONS.values()
        if not option.is_later
    }
    options["head_dim_v"] = config.head_dim if config.head_dim_v is None else config.head_dim_v
    options["layer_filter"] = layers(config.layer_filter, config.num_layers)
    return options


def refuse_unknown(given: Iterable[str], owner: str, known: Iterable[str]) -> None:
    """Raise TypeError for the first of the given options that is not among the known ones."""
    known = list(known)
    for name in given:
        if name not in known:
            hint = ""
            if name == "sinks":
                hint = ": first positions that stay hot are sink_tokens, sinks are attend's"
            raise TypeError(f"{owner} has no option {name!r}{hint}")


P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


def takes(
    config: Callable[P, CacheConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Let type checkers see the options of a configuration as the keywords of an __init__."""
    return lambda init: init


def shows(names: Iterable[str]) -> Callable[[F], F]:
    """Let `help` and `inspect.signature` see these options where a function says ``**options``."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [OPTIONS[name].parameter() for name in names]
        signature = signature.replace(parameters=[*own, *shown])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return show
