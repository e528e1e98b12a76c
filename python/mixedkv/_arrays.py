"""How numpy arrays and torch CPU tensors go in and come out; torch is never imported here."""

from __future__ import annotations

import reprlib
import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: A numpy array or a torch CPU tensor.
Array: TypeAlias = Any

_F32 = np.dtype(np.float32)
_F16 = np.dtype(np.float16)
_U8 = np.dtype(np.uint8)
_BOOL = np.dtype(np.bool_)
_HALVES = (np.dtype(np.uint16), np.dtype(np.int16))

#: dtypes that each argument takes, by what it is.
FLOATS = (_F32, _F16)
MASKS = (_F32, _F16, _BOOL)


def is_tensor(x: object) -> bool:
    """Whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _dtype_names(dtypes: tuple[np.dtype[Any], ...]) -> str:
    names = ["uint8 (Q4_0 rows)" if d == _U8 else d.name for d in dtypes]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def cpu_tensor(x: Array, name: str) -> Array:
    """Return a torch tensor as values alone: on the CPU, outside autograd."""
    torch = sys.modules["torch"]
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, and mixedkv computes no gradients: "
            "call it under torch.no_grad(), or detach it"
        )
    x = x.detach()
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


def to_numpy(x: Array, name: str, dtypes: tuple[np.dtype[Any], ...]) -> NDArray[Any]:
    """View x as a numpy array of one of dtypes whose last axis is contiguous.

    Copies only where it must: a bfloat16 tensor becomes float32, and an array whose last axis
    is strided, or that is not aligned, is laid out anew.
    """
    if is_tensor(x):
        torch = sys.modules["torch"]
        x = cpu_tensor(x, name)
        if x.dtype == torch.bfloat16 and _F32 in dtypes:
            x = x.float()
        try:
            array: NDArray[Any] = x.numpy()
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be {_dtype_names(dtypes)}, got a tensor of {x.dtype} ({error})"
            ) from None
    elif isinstance(x, np.ndarray):
        array = x
    else:
        raise TypeError(f"{name} must be a numpy array or a torch CPU tensor, got {shown(x)}")
    if array.dtype not in dtypes:
        raise TypeError(f"{name} must be {_dtype_names(dtypes)}, got {array.dtype}")
    if not array.flags.aligned or (
        array.ndim > 0 and array.shape[-1] > 1 and array.strides[-1] != array.itemsize
    ):
        array = np.array(array, order="C")
    return array


class Result:
    """Where a result goes: a float32 array to fill, and what the caller gets for it.

    Parameters
    ----------
    like
        The argument whose kind and dtype the result takes: torch in its dtype, numpy in float32.
    shape
        Shape of the result.
    out
        The caller's preallocated result, or None.
    """

    def __init__(
        self, like: Array, shape: tuple[int, ...], out: Array | None, name: str = "out"
    ) -> None:
        self._finish: Any = None
        tensor = is_tensor(like)
        if out is None:
            self.array = np.empty(shape, np.float32)
            if tensor:
                torch = sys.modules["torch"]
                dtype = like.dtype if like.dtype.is_floating_point else torch.float32
                self._finish = lambda: torch.from_numpy(self.array).to(dtype)
            else:
                self._finish = lambda: self.array
            return
        if not (is_tensor(out) or isinstance(out, np.ndarray)):
            raise TypeError(f"{name} must be a numpy array or a torch CPU tensor, got {shown(out)}")
        if tuple(out.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(out.shape)}")
        if is_tensor(out):
            torch = sys.modules["torch"]
            if out.device.type != "cpu" or (out.requires_grad and torch.is_grad_enabled()):
                raise ValueError(f"{name} must be a CPU tensor that requires no grad")
            if out.dtype == torch.float32 and (out.ndim == 0 or out.stride(-1) == 1):
                self.array = out.detach().numpy()
                self._finish = lambda: out
                return
            if not out.dtype.is_floating_point:
                raise TypeError(f"{name} must be a floating point tensor, got {out.dtype}")
            self.array = np.empty(shape, np.float32)
            self._finish = lambda: out.copy_(torch.from_numpy(self.array))
            return
        if out.dtype != _F32:
            raise TypeError(f"{name} must be float32, got {out.dtype}")
        if not out.flags.writeable:
            raise ValueError(f"{name} must be writable")
        if out.flags.aligned and (
            out.ndim == 0 or out.shape[-1] <= 1 or out.strides[-1] == out.itemsize
        ):
            self.array = out
            self._finish = lambda: out
            return
        self.array = np.empty(shape, np.float32)

        def copy_back() -> Array:
            out[...] = self.array
            return out

        self._finish = copy_back

    def get(self) -> Array:
        """Return the result in the caller's kind, dtype and memory."""
        return self._finish()


def _overlaps_itself(array: NDArray[Any]) -> bool:
    """Whether two elements of array may share memory: decided by strides, erring on yes."""
    reach = array.itemsize
    axes = sorted(
        (abs(stride), extent)
        for stride, extent in zip(array.strides, array.shape, strict=True)
        if extent > 1
    )
    for stride, extent in axes:
        if stride < reach:
            return True
        reach = stride * (extent - 1) + reach
    return False


def check_target(target: NDArray[Any], sources: dict[str, NDArray[Any] | None], name: str) -> None:
    """Refuse a target that shares memory with what is read while it is written, or with itself.

    Raises
    ------
    ValueError
        Naming both.
    """
    if target.size and not target.flags.c_contiguous and _overlaps_itself(target):
        raise ValueError(
            f"{name} must not overlap itself, got strides {target.strides} for shape {target.shape}"
        )
    for source_name, source in sources.items():
        if source is not None and np.may_share_memory(target, source):
            raise ValueError(f"{name} must not share memory with {source_name}")


def check_threads(threads: int | None) -> int:
    """Return threads as the core takes it: 0 for the default."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads must be an int or None, got {shown(threads)}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be from 1 to 1024, got {threads}")
    return int(threads)


def shown(value: Any) -> str:
    """Return what a message says of a value of a wrong type: the type, and the value, cut short."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def boolean(value: bool, name: str) -> bool:
    """Return value as a bool; TypeError names it."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return bool(value)


def bytes_of(data: Any, format: str, name: str) -> Array:
    """Return an argument as uint8 whose rows' bytes lie side by side."""
    if is_tensor(data):
        torch = sys.modules["torch"]
        data = cpu_tensor(data, name)
        if data.ndim and data.stride(-1) != 1:
            # Not contiguous(): that leaves the stride of a single value as it is.
            data = data.clone(memory_format=torch.contiguous_format)
        if format == "bf16" and data.dtype in (torch.bfloat16, torch.int16, torch.uint16):
            data = _as_bytes(data, torch.uint8, name)
        if data.dtype != torch.uint8:
            raise TypeError(f"{name} must be {_byte_types(format)}, got a tensor of {data.dtype}")
        return data
    if not isinstance(data, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch CPU tensor, got {shown(data)}")
    if data.ndim and data.shape[-1] > 1 and data.strides[-1] != data.itemsize:
        data = np.ascontiguousarray(data)
    if format == "bf16" and data.dtype in _HALVES:
        data = _as_bytes(data, _U8, name)
    if data.dtype != _U8:
        raise TypeError(f"{name} must be {_byte_types(format)}, got {data.dtype}")
    return data


def _as_bytes(data: Array, dtype: Any, name: str) -> Array:
    if data.ndim == 0:
        raise ValueError(f"{name} must have one axis at least, got a scalar")
    return data.view(dtype)


def _byte_types(format: str) -> str:
    return "uint8, uint16, int16 or bfloat16" if format == "bf16" else "uint8"
