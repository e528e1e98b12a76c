"""The mask function: what a model masks, in words that the kernel knows.

transformers describes a mask by a function of (batch, head, query, key) and asks the attention's
own mask function to make of it what the attention needs. mixedkv's kernel is causal and windowed
by itself, so here only the *kind* of mask and the padded columns are kept (`MaskPlan`). The full
[batch, 1, queries, keys] array is made when someone needs it, which a MixedCache never does.

A plan travels to the attention function inside the tensor that stands for the mask (`StandIn`):
models pass that tensor through untouched, or keep the rows of the last queries. A model that does
anything else with it works on the full mask from there on, which a MixedCache refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from .questions import QUESTIONS

# What transformers builds for a sliding window is recognised by the code of its functions, taken
# from an example made by the installed version: another way of building it is simply not
# recognised, and refused.
_WINDOW_EXAMPLE = sliding_window_causal_mask_function(7)


def _closure(function: Any) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _same_code(function: Any, example: Any) -> bool:
    return isinstance(function, FunctionType) and function.__code__ is example.__code__


def recognise(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Tell a plain causal mask (True, None) and a causal window of w keys (True, w) from others.

    Anything that is not exactly one of these two is (False, None).
    """
    if mask_function is causal_mask_function:
        return True, None
    if not _same_code(mask_function, _WINDOW_EXAMPLE):
        return False, None
    match _closure(_WINDOW_EXAMPLE), _closure(mask_function):
        case ((example, causal),), ((overlay, other),) if causal is other is causal_mask_function:
            if _same_code(overlay, example):
                match _closure(overlay):
                    case (int(window),):
                        return True, window
    return False, None


@dataclass(eq=False)
class MaskPlan:
    """What the model asked of a mask.

    Attributes
    ----------
    causal
        The mask is causal, up to the window and the padding below. If not, only `dense` tells.
    window
        Keys that a query sees, itself included (transformers' meaning), or None for all.
    columns
        Number of key columns, counted from the start of the sequence: those before
        ``kv_offset`` count too, although an attention without a MixedCache does not get them.
    validity
        bool [batch, columns], False where a column is padding; None where nothing is padded.
    aligned
        The last query stands at the last key column.
    """

    causal: bool
    window: int | None
    columns: int
    validity: torch.Tensor | None
    aligned: bool
    arguments: dict[str, Any] = field(repr=False)
    _dense: torch.Tensor | None = field(default=None, repr=False)

    def window_matters(self) -> bool:
        """Whether the window hides a column from the last query."""
        return self.window is not None and self.columns > self.window

    def dense(self) -> torch.Tensor:
        """Give the mask as bool [batch, 1, queries, keys], True where a query sees a key."""
        if self._dense is None:
            mask = sdpa_mask(
                **self.arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
            )
            assert mask is not None
            self._dense = mask
        return self._dense

    def of_last_queries(self, count: int) -> MaskPlan:
        """Give the plan of the last `count` queries."""
        dropped = self.arguments["q_length"] - count
        arguments = {
            **self.arguments,
            "q_length": count,
            "q_offset": self.arguments["q_offset"] + dropped,
        }
        return dataclasses.replace(self, arguments=arguments, _dense=None)


class StandIn(torch.Tensor):
    """Stands for the bool mask [batch, 1, queries, keys], and carries its plan.

    It has the mask's shape and, in memory, nothing of its contents. Whoever computes with it gets
    what the full mask would have given, as an ordinary tensor without a plan.
    """

    _plan: MaskPlan

    @staticmethod
    def of(plan: MaskPlan) -> StandIn:
        """Make the stand-in of a plan."""
        wanted = plan.arguments
        shape = (wanted["batch_size"], 1, wanted["q_length"], wanted["kv_length"])
        wrapped: StandIn = torch.Tensor._make_subclass(StandIn, _NOTHING.expand(shape))
        wrapped._plan = plan
        return wrapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer questions about the shape; put the full mask in this one's place otherwise."""
        kwargs = kwargs or {}
        if func in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            mask, index = args
            if isinstance(mask, StandIn) and (kept := _last_queries(index, mask.shape[2])):
                return StandIn.of(mask._plan.of_last_queries(kept))
        return func(
            *(_full(argument) for argument in args),
            **{name: _full(argument) for name, argument in kwargs.items()},
        )


_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)


def _full(argument: Any) -> Any:
    if isinstance(argument, StandIn):
        return argument._plan.dense()
    if isinstance(argument, (list, tuple)):
        return type(argument)(_full(item) for item in argument)
    return argument


def _last_queries(index: Any, queries: int) -> int:
    """Give n where the index [:, :, -n:, :] keeps the last n queries, else 0."""
    match index:
        case (slice() as batch, slice() as heads, slice() as kept, slice() as keys):
            start, stop, step = kept.indices(queries)
            if batch == heads == keys == slice(None) and (stop, step) == (queries, 1):
                return max(stop - start, 0)
    return 0


def plan_of(mask: torch.Tensor) -> MaskPlan | None:
    """Give the plan inside a mask, None where `describe_mask` did not make it."""
    return mask._plan if isinstance(mask, StandIn) else None


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor | None:
    """Stand for a mask: transformers' mask interface, registered under mixedkv's name.

    Returns
    -------
    None
        The mask is causal, its last query stands at its last key, nothing is padded, and the
        window, if there is one, hides nothing yet: what the kernel does by itself.
    torch.Tensor
        Otherwise a `StandIn`.
    """
    columns = int(kv_offset) + kv_length
    # A static cache gives its own counter here, and moves it on before the mask is made.
    q_offset = int(q_offset)
    causal, window = recognise(mask_function)
    validity = None
    if attention_mask is not None and not bool(attention_mask.all()):
        validity = attention_mask
        if attention_mask.ndim != 2:
            raise NotImplementedError(
                f"attention_mask must be [batch, columns], got {tuple(attention_mask.shape)}"
            )
    plan = MaskPlan(
        causal=causal,
        window=window,
        columns=columns,
        validity=validity,
        aligned=q_offset + q_length == columns,
        arguments={
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            "use_vmap": use_vmap,
            "device": device,
        },
    )
    if causal and plan.aligned and validity is None and not plan.window_matters():
        return None
    return StandIn.of(plan)
