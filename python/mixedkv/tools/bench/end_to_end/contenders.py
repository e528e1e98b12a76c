"""The KV caches that a model is run with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.cache_utils import DynamicCache, QuantizedCache

import mixedkv as mkv
import mixedkv.integrations.transformers as mkt

from .. import memory

__all__ = ["REFERENCE", "Contender", "Field", "check_memory", "gather"]

#: Who is right: every other contender's predictions are compared with its.
REFERENCE = "DynamicCache"

#: Largest mean KL divergence from the reference's predictions, in nats, of a contender that is
#: timed. f16 rounds K and V once, and nothing else differs. The others' bounds leave room for
#: models that suffer more from 4 bits than the one that is run by default; what is broken is
#: further off, by several nats.
_MOST_KL_F16 = 1e-3
_MOST_KL_MIXED = 0.2
_MOST_KL_QUANTIZED = 1.0

_PAD = 32
"""Cells of a tier are a multiple of this."""


@dataclass(frozen=True)
class Contender:
    """A cache and the attention that goes with it."""

    peer: str
    name: str
    #: What `set_attn_implementation` gets.
    implementation: str
    #: Makes an empty cache with room for so many tokens.
    make_cache: Callable[[int], Any]
    most_kl: float


@dataclass(frozen=True)
class Field:
    """Everyone who takes part, and who does not and why."""

    contenders: list[Contender]
    versions: dict[str, str]
    absent: dict[str, str]


def gather(config: Any, peers: Sequence[str], hot_size: int) -> Field:
    """Find who can run a model.

    Parameters
    ----------
    config
        The model's config.
    peers
        Backends of QuantizedCache to look for.
    hot_size
        Tokens of the mixed cache's hot tier, a multiple of 32.

    Returns
    -------
    Field
        mixedkv's caches and the reference always, the peers that are there.
    """
    field = Field(
        [
            Contender(
                "mixedkv",
                f"mixedkv mixed, {hot_size} hot",
                mkt.NAME,
                lambda tokens: mkt.MixedCache(
                    config, hot_size=hot_size, cold_size=_padded(tokens), sink_tokens=4
                ),
                _MOST_KL_MIXED,
            ),
            Contender(
                "mixedkv",
                "mixedkv f16",
                mkt.NAME,
                lambda tokens: mkt.MixedCache(config, hot_size=_padded(tokens), quantize=False),
                _MOST_KL_F16,
            ),
            Contender(
                "transformers",
                REFERENCE,
                "sdpa",
                lambda tokens: DynamicCache(config=config),
                0.0,
            ),
        ],
        {"mixedkv": mkv.__version__, "transformers": transformers.__version__},
        {},
    )
    for backend in peers:
        _BACKENDS[backend](field, config)
    return field


def check_memory(config: Any, tokens: int, hot_size: int) -> None:
    """Refuse, before anybody runs, caches of so many tokens that this machine has no memory for.

    Raises
    ------
    MemoryError
        mixedkv's caches would take more than there is.
    """
    memory.check_cache(config, hot_size, _padded(tokens))
    memory.check_cache(config, _padded(tokens), 0)


def _padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def _add(field: Field, config: Any, peer: str, backend: str, **options: Any) -> None:
    """Add a backend of QuantizedCache, if one can be made."""

    def make(tokens: int) -> Any:
        return QuantizedCache(backend, config, **options)

    try:
        make(0)
    except (ImportError, ValueError) as error:
        field.absent[backend] = " ".join(str(error).split())
        return
    field.contenders.append(
        Contender(peer, f"QuantizedCache {backend}", "sdpa", make, _MOST_KL_QUANTIZED)
    )
    if peer != "transformers":
        field.versions[peer] = importlib.metadata.version(peer)


def _add_fp8(field: Field, config: Any) -> None:
    _add(field, config, "transformers", "fp8")  # from transformers 5.23 on


def _add_quanto(field: Field, config: Any) -> None:
    if not _installed("optimum-quanto"):
        field.absent["quanto"] = "not installed: pip install optimum-quanto"
        return
    _add(field, config, "optimum-quanto", "quanto", nbits=4)


def _add_hqq(field: Field, config: Any) -> None:
    if not _installed("hqq"):
        field.absent["hqq"] = "not installed: pip install hqq"
        return
    # transformers' own documentation: groups along axis 1 with this backend.
    _add(field, config, "hqq", "hqq", nbits=4, axis_key=1, axis_value=1)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


_BACKENDS: dict[str, Callable[[Field, Any], None]] = {
    "fp8": _add_fp8,
    "quanto": _add_quanto,
    "hqq": _add_hqq,
}
