"""How much of a model's time goes to attention and its KV cache."""

# mypy: allow-untyped-calls

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Stopwatch:
    """Adds up the time inside a cache's `update` and the attention function.

    Storing, quantising and dequantising happen in the one or the other, depending on the cache:
    only their sum can be compared.
    """

    def __init__(self) -> None:
        self._nanoseconds = 0

    def take(self) -> float:
        """Return the seconds since the last call of this method, and begin again."""
        seconds = self._nanoseconds * 1e-9
        self._nanoseconds = 0
        return seconds

    @contextmanager
    def watching(self, implementation: str, cache: Any) -> Iterator[None]:
        """Time a cache of transformers and the attention registered under a name.

        Both get back what they had. Half a microsecond a call is what the watching costs.
        """
        function = ALL_ATTENTION_FUNCTIONS[implementation]
        ALL_ATTENTION_FUNCTIONS[implementation] = self._timed(function)
        cache.update = self._timed(cache.update)
        try:
            yield
        finally:
            del cache.update  # the class's own appears again
            del ALL_ATTENTION_FUNCTIONS[implementation]
            if ALL_ATTENTION_FUNCTIONS.get(implementation) is not function:
                ALL_ATTENTION_FUNCTIONS[implementation] = function

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        now = time.perf_counter_ns

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._nanoseconds += now() - start

        return timed
