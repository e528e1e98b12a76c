"""Looks into the metadata of a trace that nobody vouches for.

Each value has the type and the range that the format gives it, or the file is refused in one line.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf_file import TraceError

INT32_MAX = 2**31 - 1

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def short(value: Any) -> str:
    """Write a value of a file, cut to what fits a message, control characters escaped."""
    return _SHORT.repr(value)


class Metadata:
    """The entries below ``kqv_trace.``."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def __contains__(self, key: str) -> bool:
        return f"kqv_trace.{key}" in self.values

    def refuse(self, key: str, why: str) -> TraceError:
        """Give the error that says what is wrong with an entry."""
        return TraceError(f"{self.path.name}: kqv_trace.{key} {why}")

    def get(self, key: str) -> Any:
        """Give an entry that must be there."""
        if key not in self:
            raise TraceError(f"{self.path.name}: lacks the metadata kqv_trace.{key}")
        return self.values[f"kqv_trace.{key}"]

    def integer(self, key: str) -> int:
        """Give a single integer."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, f"must be an integer, got {short(value)}")
        return value

    def text(self, key: str) -> str:
        """Give a string."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.refuse(key, f"must be a string, got {short(value)}")
        return value

    def notes(self, besides: tuple[str, ...]) -> dict[str, str]:
        """Give all strings, but for those named."""
        names = {name: name.removeprefix("kqv_trace.") for name in self.values}
        return {
            key: self.values[name]
            for name, key in names.items()
            if key != name and key not in besides and isinstance(self.values[name], str)
        }

    def texts(self, key: str, length: int | None = None) -> list[str]:
        """Give an array of strings."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.refuse(key, "must be an array of strings")
        self._check_length(key, len(value), length)
        return value

    def integers(
        self, key: str, low: int, high: int = INT32_MAX, *, length: int | None = None
    ) -> list[int]:
        """Give an array of integers from `low` to `high`."""
        values: list[int] = self.integer_array(key, low, high, length=length).tolist()
        return values

    def integer_array(
        self, key: str, low: int, high: int = INT32_MAX, *, length: int | None = None
    ) -> NDArray[np.int64]:
        """Give an array of integers from `low` to `high`, int64."""
        values = self._array(key, "iu", "integers", length)
        wrong = (values < low) | (values > high)
        if wrong.any():
            value = int(values[wrong.argmax()])
            raise self.refuse(key, f"holds {value}; {low} to {high} are possible")
        return values.astype(np.int64)

    def floats(self, key: str, length: int) -> list[float]:
        """Give an array of numbers that are finite, and not rounded to 0, as float32."""
        values = self._array(key, "f", "floats", length).astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            narrow = values.astype(np.float32)
        for value, rounded in zip(values.tolist(), narrow.tolist(), strict=True):
            if not np.isfinite(value):
                raise self.refuse(key, "holds a value that is not finite")
            if not np.isfinite(rounded) or (value != 0 and rounded == 0):
                raise self.refuse(key, f"holds {value:g}, which is out of float32's range")
        return [float(value) for value in values]

    def _array(self, key: str, kinds: str, what: str, length: int | None) -> NDArray[Any]:
        value = self.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self.refuse(key, f"must be an array of {what}")
        self._check_length(key, len(value), length)
        return value

    def _check_length(self, key: str, found: int, wanted: int | None) -> None:
        if wanted is not None and found != wanted:
            raise self.refuse(key, f"has {found} values for {wanted}")
