"""Formats of rows: what the bytes of keys and values may mean.

The table is the core's own. ``f32`` and ``f16`` are plain numpy and torch arrays; rows of any other
format are a :class:`mixedkv.QuantizedArray`, which :func:`mixedkv.quantize` returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import _core
from ._arrays import shown
from ._indexing import whole

__all__ = ["Format", "available", "info", "packed"]


@dataclass(frozen=True)
class Format:
    """What a row's bytes mean."""

    name: str
    #: Values that share a block; 1 where each stands alone.
    block_values: int
    block_bytes: int
    #: ggml's number of the same bytes; None where it has none.
    ggml_type: int | None
    #: Finite values of this magnitude and more don't stay finite; None where all do.
    overflow: float | None
    #: Whether a block's scale can be chosen by least squared error (``fit_scales``); those of nl4
    #: and nl3 always are.
    fits: bool

    @property
    def bits(self) -> float:
        """Bits a value, scales included."""
        return 8 * self.block_bytes / self.block_values

    @property
    def packed(self) -> bool:
        """Whether rows come as bytes, in a QuantizedArray: numpy has no such type."""
        return self.name not in ("f32", "f16")

    def row_bytes(self, n: int) -> int:
        """Return the bytes of a row of n values.

        Raises
        ------
        ValueError
            Where n is not a multiple of block_values.
        """
        if whole(n, "n") < 0 or n % self.block_values:
            raise ValueError(f"n must be a multiple of {self.block_values}, got {n}")
        return n // self.block_values * self.block_bytes

    def row_values(self, num_bytes: int) -> int:
        """Return the values of a row of so many bytes.

        Raises
        ------
        ValueError
            Where these are not whole blocks.
        """
        if whole(num_bytes, "num_bytes") < 0 or num_bytes % self.block_bytes:
            raise ValueError(f"num_bytes must be a multiple of {self.block_bytes}, got {num_bytes}")
        return num_bytes // self.block_bytes * self.block_values


_FORMATS = {
    name: Format(name, values, size, number if number >= 0 else None, overflow or None, fits)
    for name, values, size, number, overflow, fits in _core.formats()
}


def available() -> list[str]:
    """Return the names of all formats, which caches take for hot and cold keys and values."""
    return list(_FORMATS)


def packed() -> list[str]:
    """Return the names of the formats whose rows are bytes in a QuantizedArray."""
    return [name for name, one in _FORMATS.items() if one.packed]


def info(name: str) -> Format:
    """Return what there is to know of a format.

    Raises
    ------
    ValueError
        Where there is none of that name.
    TypeError
        Where name is no str.
    """
    return find(name, "name", available())


def find(value: str, name: str, allowed: list[str]) -> Format:
    """Return the format that an argument names; ValueError and TypeError name the argument."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {shown(value)}")
    if value not in allowed:
        listed = ", ".join(repr(one) for one in allowed[:-1]) + f" or {allowed[-1]!r}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")
    return _FORMATS[value]
