"""A model fed given tokens through a cache, holding at each step what decoding would hold.

Between two moves a cache only grows at its hot end: tokens that come between them are all attended
in the hot type, by themselves or together. So a chunk of tokens goes through the model in one
forward as long as no move falls inside it, and what attention sees is what it would see token by
token.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch

import mixedkv.integrations.transformers as mkt

from .configurations import config_of

MOST_TOKENS = 512
"""Of a forward: its logits and activations take memory."""


class StepCache(Protocol):
    """A cache that says when its next move falls."""

    @property
    def cache(self) -> Any:
        """What transformers takes as past_key_values."""

    def until_move(self) -> int | None:
        """Tokens that a forward may bring before a move falls, at least 1; None: any number."""

    def commit(self) -> None:
        """Be told that a forward is over."""


class RealCache:
    """mixedkv's own cache, for one sequence.

    Parameters
    ----------
    model_config
        The model's config (``model.config``).
    options
        Of a cache, for `MixedCache`.
    record_history
        As there.
    """

    def __init__(
        self, model_config: Any, options: dict[str, Any], *, record_history: bool = False
    ) -> None:
        self._config = config_of(options)
        self.cache = mkt.MixedCache(
            model_config, preset=None, record_history=record_history, **options
        )

    def until_move(self) -> int | None:
        """See `StepCache`."""
        config, natives = self._config, self.cache.natives
        if not config.quantize:
            return None
        # All of them hold the same tokens, and none is made before the first comes.
        hot_tokens = natives[0].stats().hot_tokens if natives else 0
        # commit moves above the level, find_slot where hot is full.
        level = math.floor(config.threshold * config.hot_size)
        return max(min(level + 1, config.hot_size) - hot_tokens, 1)

    def commit(self) -> None:
        """See `StepCache`: the cache has committed by itself."""


def feed(
    model: Any, tokens: torch.Tensor, cache: StepCache, first: int = 0, most: int = MOST_TOKENS
) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed tokens to a model, in chunks with no move inside, and give logits as they come.

    Parameters
    ----------
    tokens
        int64 [tokens], what follows the tokens already in the cache.
    first
        Index of the first token after which logits are wanted.
    most
        Most tokens of a chunk.

    Yields
    ------
    tuple
        Tokens fed so far, and the logits [n, vocabulary] after the last n of them; n may be 0.
    """
    done = 0
    while done < len(tokens):
        room = cache.until_move()
        count = min(most if room is None else room, most, len(tokens) - done)
        stop = done + count
        wanted = min(max(stop - first, 0), count)
        with torch.inference_mode():
            output = model(
                tokens[None, done:stop], past_key_values=cache.cache, logits_to_keep=max(wanted, 1)
            )
            cache.commit()
        done = stop
        yield done, output.logits[0, output.logits.shape[1] - wanted :].float()
