"""Q4_0, ggml's 4-bit format: 32 values a block, one f16 scale, 18 bytes.

In numpy and torch a Q4_0 tensor is ``uint8`` whose last axis holds whole blocks: a row of n values
is ``n // 32 * 18`` bytes, byte for byte what ggml writes.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core, formats
from ._arrays import FLOATS, Array, boolean, check_target, check_threads, is_tensor, shown, to_numpy
from ._indexing import whole

__all__ = ["BLOCK_BYTES", "BLOCK_VALUES", "dequantize_q4_0", "quantize_q4_0", "row_bytes_q4_0"]

#: Values in a block.
BLOCK_VALUES = 32
#: Bytes of a block: an f16 scale and 16 bytes of nibbles.
BLOCK_BYTES = 18


def row_bytes_q4_0(n: int) -> int:
    """Return the bytes of a Q4_0 row of n values, n a multiple of 32."""
    if whole(n, "n") < 0 or n % BLOCK_VALUES:
        raise ValueError(f"n must be a multiple of {BLOCK_VALUES}, got {n}")
    return n // BLOCK_VALUES * BLOCK_BYTES


def quantize_q4_0(
    x: Array,
    *,
    out: Array | None = None,
    threads: int | None = None,
    allow_non_finite: bool = False,
) -> Array:
    """Quantise rows to Q4_0, byte for byte as ggml does.

    A block's scale is ``d = max / -8``, where max is the value of largest magnitude with its sign
    (the first one on a tie); a value becomes ``min(15, trunc(x / d + 8.5))``; d is stored as f16.
    The d of a block with a magnitude of 524,160 or more would be infinite.

    Parameters
    ----------
    x
        float32 or float16 array or tensor [..., n] (torch also bfloat16), n a multiple of 32.
    out
        uint8 [..., n // 32 * 18], contiguous in its last axis, of any kind; filled and returned.
    threads
        Threads to use; None: :func:`mixedkv.get_num_threads`.
    allow_non_finite
        Convert whatever comes: blocks with an infinity or a NaN read back as NaN, those beyond the
        format have ggml's bytes.

    Returns
    -------
    uint8 [..., n // 32 * 18], torch where x is torch.

    Raises
    ------
    ValueError
        Where n is not a multiple of 32, x holds a NaN, an infinity or a magnitude of 524,160 or
        more (nothing is written then), or out has another shape.
    TypeError
        Where x or out has another dtype.
    """
    array = to_numpy(x, "x", FLOATS)
    if array.ndim == 0:
        raise ValueError("x must have one axis at least, got a scalar")
    n = array.shape[-1]
    if n % BLOCK_VALUES:
        raise ValueError(
            f"the last axis of x must be a multiple of {BLOCK_VALUES}, got shape {array.shape}"
        )
    shape = (*array.shape[:-1], row_bytes_q4_0(n))
    target, result = target_of(x, shape, out, np.dtype(np.uint8))
    check_target(target, {"x": array}, "out")
    check = not boolean(allow_non_finite, "allow_non_finite")
    convert(array, plain_format(array), target, "q4_0", check_threads(threads), "x", check=check)
    return result


def dequantize_q4_0(
    b: Array,
    *,
    dtype: Any = np.float32,
    out: Array | None = None,
    threads: int | None = None,
    allow_non_finite: bool = False,
) -> Array:
    """Return the values of Q4_0 rows: ``(nibble - 8) * d``.

    Parameters
    ----------
    b
        uint8 array or tensor [..., m], m a multiple of 18.
    dtype
        numpy.float32 or numpy.float16 (or torch's); the product is rounded to it once.
    out
        [..., m // 18 * 32] of that dtype, filled and returned.
    threads
        Threads to use; None: :func:`mixedkv.get_num_threads`.
    allow_non_finite
        Let finite values beyond float16 become infinities.

    Returns
    -------
    [..., m // 18 * 32] of dtype, torch where b is torch.

    Raises
    ------
    ValueError
        Where m is not a multiple of 18, out has another shape, or dtype is float16 and a finite
        value's magnitude is 65,520 or more (nothing is written then).
    TypeError
        Where b is not uint8, or dtype is neither float32 nor float16.
    """
    array = to_numpy(b, "b", (np.dtype(np.uint8),))
    if array.ndim == 0:
        raise ValueError("b must have one axis at least, got a scalar")
    m = array.shape[-1]
    if m % BLOCK_BYTES:
        raise ValueError(
            f"the last axis of b must be a multiple of {BLOCK_BYTES}, got shape {array.shape}"
        )
    wanted = float_dtype(dtype)
    shape = (*array.shape[:-1], m // BLOCK_BYTES * BLOCK_VALUES)
    target, result = target_of(b, shape, out, wanted)
    check_target(target, {"b": array}, "out")
    check = not boolean(allow_non_finite, "allow_non_finite")
    convert(array, "q4_0", target, plain_format(target), check_threads(threads), "b", check=check)
    return result


def plain_format(array: NDArray[Any]) -> str:
    """Return the format of an array of float32 or float16."""
    return "f16" if array.dtype == np.float16 else "f32"


def convert(
    source: NDArray[Any],
    source_format: str,
    target: NDArray[Any],
    target_format: str,
    threads: int,
    name: str,
    *,
    check: bool,
    fit_scales: bool = False,
) -> None:
    """Convert rows of any leading shape; in place where the target's rows have one stride.

    check: ValueError names the first value of the source, called name, that the target's format
    does not keep, and nothing is written.
    """
    if not source.size:
        return
    rows = target.reshape(-1, target.shape[-1])
    in_place = np.may_share_memory(rows, target) and rows.strides[-1] == rows.itemsize
    if not in_place:
        rows = np.empty(rows.shape, rows.dtype)
    flat = source.reshape(-1, source.shape[-1])
    found = _core.convert(flat, source_format, rows, target_format, check, fit_scales, threads)
    if found is not None:
        raise ValueError(_not_kept(found, source.shape[:-1], formats.info(target_format), name))
    if not in_place:
        target[...] = rows.reshape(target.shape)


def _not_kept(
    found: tuple[int, int, float], leading: tuple[int, ...], target: formats.Format, name: str
) -> str:
    row, column, value = found
    places = [int(place) for place in np.unravel_index(row, leading)] if leading else []
    where = f"{name}[{', '.join(str(place) for place in [*places, column])}]"
    if not math.isfinite(value):
        return (
            f"{name} must be finite for {target.name}, got {where} = {value}; nothing was written"
        )
    return (
        f"{name} must have magnitudes below {target.overflow:.9g} for {target.name}, got {where} = "
        f"{value:.9g}; nothing was written"
    )


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """Return numpy's float32 or float16 for what may be torch's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        dtype = {torch.float32: np.float32, torch.float16: np.float16}.get(dtype, dtype)
    for wanted in FLOATS:
        try:
            if wanted == np.dtype(dtype):
                return wanted
        except TypeError:
            break
    raise TypeError(f"dtype must be float32 or float16, got {dtype}")


def target_of(
    like: Array, shape: tuple[int, ...], out: Array | None, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], Array]:
    """Return the numpy array to fill and the object to hand back."""
    if out is None:
        target = np.empty(shape, dtype)
        return target, sys.modules["torch"].from_numpy(target) if is_tensor(like) else target
    if not (is_tensor(out) or isinstance(out, np.ndarray)):
        raise TypeError(f"out must be a numpy array or a torch CPU tensor, got {shown(out)}")
    target = out.detach().numpy() if is_tensor(out) else out
    if target.dtype != dtype:
        raise TypeError(f"out must be {dtype}, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {target.shape}")
    if not target.flags.writeable:
        raise ValueError("out must be writable")
    return target, out
