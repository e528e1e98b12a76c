"""Rows of a format that numpy and torch have no type for: their bytes, and what these mean."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import formats
from ._arrays import (
    FLOATS,
    Array,
    boolean,
    bytes_of,
    check_target,
    check_threads,
    is_tensor,
    to_numpy,
)
from ._indexing import listed, new_shape, place, take, whole
from .quantize import convert, float_dtype, plain_format, target_of

__all__ = ["QuantizedArray", "quantize"]

_U8 = np.dtype(np.uint8)
#: What rows of keys or values are told by where they come as a numpy type. (dtype.name is slow.)
_FORMAT_OF: dict[np.dtype[Any], formats.Format] = {
    np.dtype(np.float32): formats.info("f32"),
    np.dtype(np.float16): formats.info("f16"),
    _U8: formats.info("q4_0"),
}
_ROWS = tuple(_FORMAT_OF)
_PACKED = formats.packed()
_BF16 = formats.info("bf16")


class QuantizedArray:
    """Rows of a format, as a view of their bytes.

    Every op takes one for keys and for values, and caches export their rows in it. It is indexed,
    reshaped and transposed like an array of values [..., n], all but the last axis: that one holds
    whole blocks.

    Slices are views, with negative steps too; torch has no negative strides, so that a slice
    backwards of a tensor, and :meth:`torch` of a numpy one, is a copy. Views of read-only data are
    read-only. Copies, by :meth:`copy`, :mod:`copy` and :mod:`pickle`, hold the view's own rows
    alone, side by side, and may be written to.

    ``np.asarray(a)`` gives the values as float32, always a copy: ``copy=False`` is refused, and a
    dtype converts them. ``a == b`` is one bool, never an array: whether both are QuantizedArrays of
    the same format, shape and bytes (numpy or torch; a NaN's bytes equal themselves). Whatever else
    it is compared with is unequal, an array of its values too. It has no hash. To other functions
    of numpy it is its values: ``x - a``, ``np.abs(a)``.

    Parameters
    ----------
    data
        uint8 numpy array or torch CPU tensor [..., bytes of a row], viewed, not copied, where the
        bytes of a row lie side by side. For "bf16" also uint16 or int16 [..., n], or a bfloat16
        tensor.
    format
        One of :func:`mixedkv.formats.packed`.

    Raises
    ------
    ValueError
        Where the last axis is not whole blocks, or the format is no such format.
    TypeError
        Where data has another dtype, or is no array.
    """

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("_data", "_format")

    def __init__(self, data: Array, format: str) -> None:
        self._format = find_packed(format, "format")
        self._data = bytes_of(data, self._format.name, "data")
        if self._data.ndim == 0:
            raise ValueError("data must have one axis at least, got a scalar")
        if self._data.shape[-1] % self._format.block_bytes:
            raise ValueError(
                f"the last axis of data must be a multiple of {self._format.block_bytes} bytes, "
                f"whole blocks of {self._format.name}, got shape {tuple(self._data.shape)}"
            )

    # --- what it is --------------------------------------------------------------------------

    @property
    def data(self) -> Array:
        """The bytes: uint8 [..., bytes of a row], numpy or torch."""
        return self._data

    @property
    def format(self) -> str:
        """The format's name."""
        return self._format.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in values."""
        *leading, width = self._data.shape
        return (*leading, self._format.row_values(width))

    @property
    def ndim(self) -> int:
        """Axes."""
        return int(self._data.ndim)

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self._data.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        kind = "torch" if is_tensor(self._data) else "numpy"
        return f"QuantizedArray({self.format}, shape={self.shape}, {kind}, {self.nbytes} bytes)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, QuantizedArray)
            and self.format == other.format
            and self.shape == other.shape
            and np.array_equal(_numpy(self._data), _numpy(other._data))
        )

    def __reduce__(self) -> tuple[type[QuantizedArray], tuple[Array, str]]:
        # A torch view would bring all that its storage holds along, a numpy one its axes' order.
        if not is_tensor(self._data):
            return QuantizedArray, (np.ascontiguousarray(self._data), self.format)
        is_all = self._data.untyped_storage().nbytes() == self.nbytes
        alone = is_all and self._data.is_contiguous()
        return QuantizedArray, (self._data if alone else self.copy().data, self.format)

    def __copy__(self) -> QuantizedArray:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedArray:
        return self.copy()

    # --- its values ----------------------------------------------------------------------------

    def dequantize(
        self,
        dtype: Any = np.float32,
        *,
        out: Array | None = None,
        threads: int | None = None,
        allow_non_finite: bool = False,
    ) -> Array:
        """Return the values [..., n], rounded once where dtype is float16.

        Parameters
        ----------
        dtype
            numpy.float32 or numpy.float16, or torch's.
        out
            [..., n] of that dtype, of any kind; filled and returned.
        threads
            Threads to use; None: :func:`mixedkv.get_num_threads`.
        allow_non_finite
            Let finite values beyond float16 become infinities.

        Returns
        -------
        [..., n] of dtype, torch where data is torch.

        Raises
        ------
        ValueError
            Where out has another shape, or dtype is float16 and a finite value's magnitude is
            65,520 or more (nothing is written then).
        """
        wanted = float_dtype(dtype)
        target, result = target_of(self._data, self.shape, out, wanted)
        source = self.rows()
        check_target(target, {"data": source}, "out")
        kind = plain_format(target)
        check = not boolean(allow_non_finite, "allow_non_finite")
        convert(source, self.format, target, kind, check_threads(threads), "values", check=check)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the values of a QuantizedArray can't be had without a copy")
        values: NDArray[Any] = self.numpy().dequantize()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Take part in numpy's arithmetic as values; an array's == and != ask :meth:`__eq__`."""
        if ufunc in (np.equal, np.not_equal) and method == "__call__":
            if options:
                raise TypeError(
                    f"{ufunc.__name__} of a QuantizedArray gives one bool and takes no "
                    f"{', '.join(sorted(options))}: compare np.asarray() of it, value by value"
                )
            first, second = inputs
            same = first.__eq__(second) if first is self else self.__eq__(first)
            return same if ufunc is np.equal else not same
        if any(isinstance(one, QuantizedArray) for one in options.get("out", ())):
            return NotImplemented
        values = (np.asarray(x) if isinstance(x, QuantizedArray) else x for x in inputs)
        return getattr(ufunc, method)(*values, **options)

    # --- views ---------------------------------------------------------------------------------

    def rows(self) -> NDArray[np.uint8]:
        """Return the bytes as numpy, a row's side by side, aligned as the format needs."""
        array = to_numpy(self._data, "data", (_U8,))
        if self._format is _BF16 and not array.view(np.uint16).flags.aligned:
            array = np.array(array, order="C")
        return array

    def numpy(self) -> QuantizedArray:
        """Return the same rows as numpy, sharing memory."""
        return QuantizedArray(_numpy(self._data), self.format)

    def torch(self) -> QuantizedArray:
        """Return the same rows as a torch tensor.

        It shares memory where torch can: read-only data, which it has no word for, and views with
        negative strides are copied.
        """
        if is_tensor(self._data):
            return self
        import torch

        data = self._data
        if not data.flags.writeable or min(data.strides) < 0:
            data = data.copy()
        return QuantizedArray(torch.from_numpy(data), self.format)

    def copy(self) -> QuantizedArray:
        """Return the same rows in memory of their own, one after the other, to be written to."""
        data = self._data
        if is_tensor(data):
            data = data.clone(memory_format=sys.modules["torch"].contiguous_format)
        else:
            data = data.copy()
        return QuantizedArray(data, self.format)

    def __getitem__(self, index: Any) -> QuantizedArray:
        return QuantizedArray(take(self._data, index, self.shape), self.format)

    def __iter__(self) -> Iterator[QuantizedArray]:
        if self.ndim == 1:
            raise TypeError("a QuantizedArray of one axis has no rows to iterate over")
        return (self[i] for i in range(len(self)))

    def reshape(self, *shape: Any) -> QuantizedArray:
        """Return the rows in another shape with the same last axis; one axis may be -1."""
        wanted = new_shape(listed(shape, "shape"), self.shape)
        return QuantizedArray(self._data.reshape((*wanted[:-1], self._data.shape[-1])), self.format)

    def swapaxes(self, axis1: int, axis2: int) -> QuantizedArray:
        """Return the rows with two axes, neither of them the last, in each other's place."""
        axes = list(range(self.ndim))
        a, b = (place(whole(axis, "axis"), self.ndim) for axis in (axis1, axis2))
        axes[a], axes[b] = axes[b], axes[a]
        return self.transpose(*axes)

    def transpose(self, *axes: Any) -> QuantizedArray:
        """Return the rows with their axes in another order, the last one last (as numpy's)."""
        order = listed(axes, "axes")
        places = [place(axis, self.ndim) for axis in order]
        if sorted(places) != list(range(self.ndim)) or places[-1] != self.ndim - 1:
            raise ValueError(
                f"axes must be all of 0 to {self.ndim - 1}, the last one last, which holds whole "
                f"blocks; got {tuple(order)}"
            )
        moved = (
            self._data.permute(places) if is_tensor(self._data) else self._data.transpose(places)
        )
        return QuantizedArray(moved, self.format)


def quantize(
    x: Array,
    format: str,
    *,
    out: QuantizedArray | Array | None = None,
    fit_scales: bool = False,
    threads: int | None = None,
    allow_non_finite: bool = False,
) -> QuantizedArray:
    """Convert rows of values to a format, byte for byte as ggml does where it has the format.

    "q4_0" as by :func:`quantize_q4_0`; "q8_0": 8 bits a value, ``d = largest magnitude / 127``;
    "iq4_nl": 4 bits, of sixteen levels that lie closer around zero, d by least weighted squares (as
    ggml's caches convert); "nl4" and "nl3", our own: 4.25 and 3.5 bits, sixteen and eight levels,
    one scale for 64 and for 32 values by least squared error (docs/formats.md), for rows that are
    rotated; "bf16": the upper half of a float32, rounded to nearest even.

    Parameters
    ----------
    x
        float32 or float16 array or tensor [..., n] (torch also bfloat16), n a multiple of the
        format's block.
    format
        One of :func:`mixedkv.formats.packed`.
    out
        A QuantizedArray of x's shape and this format, or uint8 [..., bytes of a row], contiguous in
        its last axis; filled.
    fit_scales
        Choose each block's scale by its squared error: of "q4_0" and "iq4_nl" ggml's, or the best
        of eighteen others (docs/formats.md), in bytes that ggml reads. "nl4" and "nl3" always do;
        other formats have no choice.
    threads
        Threads to use; None: :func:`mixedkv.get_num_threads`.
    allow_non_finite
        Convert whatever comes: blocks with an infinity or a NaN read back as NaN, those beyond the
        format have ggml's bytes, mostly infinities.

    Returns
    -------
    The rows, torch where x is torch; out, where that is a QuantizedArray, or a view of it.

    Raises
    ------
    ValueError
        Where n is not a multiple of the block, x holds a finite value that the format does not
        keep finite (:attr:`mixedkv.formats.Format.overflow`), a NaN or an infinity (bf16 keeps
        these), out has another shape or format, or fit_scales is set for a format that has no
        choice. Nothing is written then.
    TypeError
        Where x or out has another dtype, or fit_scales is no bool.
    """
    kind = find_packed(format, "format")
    fitted = boolean(fit_scales, "fit_scales")
    array = to_numpy(x, "x", FLOATS)
    if array.ndim == 0:
        raise ValueError("x must have one axis at least, got a scalar")
    if array.shape[-1] % kind.block_values:
        raise ValueError(
            f"the last axis of x must be a multiple of {kind.block_values} for {format}, got shape "
            f"{array.shape}"
        )
    if isinstance(out, QuantizedArray):
        if out.format != format:
            raise ValueError(f"out must be of format {format}, got {out.format}")
        if out.shape != array.shape:
            raise ValueError(f"out must have shape {array.shape}, got {out.shape}")
    shape = (*array.shape[:-1], kind.row_bytes(array.shape[-1]))
    data = out.data if isinstance(out, QuantizedArray) else out
    target, result = target_of(x, shape, data, _U8)
    check_target(target, {"x": array}, "out")
    check, num = not boolean(allow_non_finite, "allow_non_finite"), check_threads(threads)
    source = plain_format(array)
    convert(array, source, target, format, num, "x", check=check, fit_scales=fitted)
    return out if isinstance(out, QuantizedArray) else QuantizedArray(result, format)


def find_packed(value: str, name: str) -> formats.Format:
    """Return the format that an argument names, which must be one of bytes."""
    if isinstance(value, str) and value in ("f32", "f16"):
        raise ValueError(f"{name} must not be {value!r}: such rows are plain arrays")
    return formats.find(value, name, _PACKED)


def rows_of(x: Any, name: str) -> tuple[NDArray[Any], formats.Format]:
    """Return keys or values as the core takes them, and their format.

    Values that numpy has a type for, a QuantizedArray, a bfloat16 tensor, or, for short, the bytes
    of Q4_0 rows; copied only where rows are strided or not aligned.
    """
    if isinstance(x, QuantizedArray):
        return x.rows(), formats.info(x.format)
    if is_tensor(x) and x.dtype == sys.modules["torch"].bfloat16:
        return QuantizedArray(bytes_of(x, "bf16", name), "bf16").rows(), formats.info("bf16")
    array = to_numpy(x, name, _ROWS)
    return array, _FORMAT_OF[array.dtype]


def row_width(array: NDArray[Any], kind: formats.Format, name: str) -> int:
    """Return how many values a row of rows_of has."""
    width = int(array.shape[-1])
    if not kind.packed:
        return width
    if width % kind.block_bytes:
        raise ValueError(
            f"the last axis of {kind.name.upper()} rows in {name} must be a multiple of "
            f"{kind.block_bytes} bytes, got shape {array.shape}"
        )
    return kind.row_values(width)


def _numpy(data: Array) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = data.numpy() if is_tensor(data) else data
    return array
