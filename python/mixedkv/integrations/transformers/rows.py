"""Handles: what a model gets in place of the keys and values that the cache took."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv

from .masks import MaskPlan
from .questions import QUESTIONS
from .steps import Step


class RowStore(Protocol):
    """What the attention function needs of the cache behind a handle: `MixedCache`."""

    def attend(
        self,
        handle: Handle,
        query: torch.Tensor,
        plan: MaskPlan | None,
        *,
        for_layer: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Store the handle's rows, if they are not yet, and attend over the whole cache."""
        ...


class Handle:
    """New keys and values of one layer in one step, on their way into the cache.

    Attributes
    ----------
    cache, step, layer
        Whose rows these are.
    k, v
        The new rows, [batch, kv heads, width, head_dim]; dropped once they are stored.
    """

    __slots__ = ("cache", "k", "layer", "step", "v")

    def __init__(
        self, cache: RowStore, step: Step, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.cache = cache
        self.step = step
        self.layer = layer
        self.k: torch.Tensor | None = k
        self.v: torch.Tensor | None = v

    @property
    def stored(self) -> bool:
        """Whether the rows are in the cache already: another layer may attend them again."""
        return self.k is None


class CachedRows(torch.Tensor):
    """Keys (or values) that a MixedCache took: a tensor to hand on, not to compute with.

    It has the shape and dtype of the step's new rows. The tokens before them are in the cache
    alone, so any arithmetic on it would silently attend to the newest tokens only; this class
    turns that into an error. Only mixedkv's attention function looks behind it.
    """

    _handle: Handle

    @staticmethod
    def wrap(rows: torch.Tensor, handle: Handle) -> CachedRows:
        """Make a handle of `rows`, sharing their memory and no graph."""
        wrapped: CachedRows = torch.Tensor._make_subclass(CachedRows, rows)
        wrapped._handle = handle
        return wrapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer questions about shape and kind; refuse whatever would read the rows."""
        if func in _UNCHANGED and isinstance(args[0], CachedRows):
            rows = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                if func(rows, *args[1:], **(kwargs or {})) is rows:
                    return rows
        elif func in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise RuntimeError(
            f"{name}() was called on keys or values that are in a MixedCache, and only "
            "mixedkv's attention can read them. Load the model with "
            'attn_implementation="mixedkv" (or call model.set_attn_implementation("mixedkv")) '
            "after mixedkv.integrations.transformers.register(); a model that works on its keys "
            "between cache and attention can't be served"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CachedRows(shape={tuple(self.shape)}, dtype={self.dtype})"


# Conversions that models write out of habit: fine where there is nothing to convert.
_UNCHANGED: frozenset[Any] = frozenset({torch.Tensor.to, torch.Tensor.contiguous})


def handle_of(rows: torch.Tensor) -> Handle | None:
    """Give the handle behind a tensor, or None for an ordinary tensor."""
    return rows._handle if isinstance(rows, CachedRows) else None


def to_array(rows: torch.Tensor) -> NDArray[Any]:
    """View a tensor as an array; a copy in f32 of bf16, which numpy does not know."""
    if rows.requires_grad:
        rows = rows.detach()
    array: NDArray[Any] = (rows.float() if rows.dtype is torch.bfloat16 else rows).numpy()
    return array


def to_bits(rows: torch.Tensor) -> NDArray[Any]:
    """View a tensor as an array, never a copy; bf16 as its bits, uint16: `stored_as` has them."""
    if rows.requires_grad:
        rows = rows.detach()
    is_bf16 = rows.dtype is torch.bfloat16
    array: NDArray[Any] = (rows.view(torch.uint16) if is_bf16 else rows).numpy()
    return array


def stored_as(rows: NDArray[Any]) -> NDArray[Any] | mkv.QuantizedArray:
    """Give rows out of `to_bits` as a cache stores them."""
    return mkv.QuantizedArray(rows, "bf16") if rows.dtype == np.uint16 else rows
