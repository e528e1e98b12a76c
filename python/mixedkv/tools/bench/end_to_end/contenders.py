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

from ... import memory
from ...memory import padded

#: Who is right: every other contender's predictions are compared with its.
REFERENCE = "DynamicCache"

#: Largest mean KL divergence from the reference's predictions, in nats, of a contender that is
#: timed. f16 rounds K and V once, and nothing else differs. The others' bounds leave room for
#: models that suffer more from 4 bits than the one that is run by default; what is broken is
#: further off, by several nats.
_MOST_KL_F16 = 1e-3
_MOST_KL_MIXED = 0.2
_MOST_KL_QUANTIZED = 1.0


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
                    config, hot_size=hot_size, cold_size=padded(tokens), sink_tokens=4
                ),
                _MOST_KL_MIXED,
            ),
            Contender(
                "mixedkv",
                "mixedkv f16",
                mkt.NAME,
                lambda tokens: mkt.MixedCache(config, hot_size=padded(tokens), quantize=False),
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
        _add(field, config, backend)
    return field


def check_memory(config: Any, tokens: int, hot_size: int) -> None:
    """Refuse, before anybody runs, caches of so many tokens that this machine has no memory for.

    Raises
    ------
    MemoryError
        mixedkv's caches would take more than there is.
    """
    memory.check_cache(config, hot_size, padded(tokens))
    memory.check_cache(config, padded(tokens), 0)


_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("transformers", {}),  # from transformers 5.23 on
    "quanto": ("optimum-quanto", {"nbits": 4}),
    # transformers' own documentation: groups along axis 1 with this backend.
    "hqq": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
}
"""Backends of QuantizedCache: whose they are, and their options."""


def _add(field: Field, config: Any, backend: str) -> None:
    """Add a backend of QuantizedCache, if one can be made."""
    peer, options = _BACKENDS[backend]

    def make(tokens: int) -> Any:
        return QuantizedCache(backend, config, **options)

    try:
        version = field.versions.get(peer) or importlib.metadata.version(peer)
        make(0)
    except importlib.metadata.PackageNotFoundError:
        field.absent[backend] = f"not installed: pip install {peer}"
    except (ImportError, ValueError) as error:
        field.absent[backend] = " ".join(str(error).split())
    else:
        field.versions[peer] = version
        field.contenders.append(
            Contender(peer, f"QuantizedCache {backend}", "sdpa", make, _MOST_KL_QUANTIZED)
        )
