"""A step: one forward of the model, and where its columns go."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .masks import MaskPlan


class Placement(NamedTuple):
    """Where a step's columns go.

    Attributes
    ----------
    kept
        Which of the rows * width columns (row-major) are stored, in order; None for all.
    num_tokens
        How many that are.
    """

    kept: torch.Tensor | None
    num_tokens: int

    def cut(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Bring [batch, heads, width, dim] to the rows of the slot, [heads, tokens, dim]."""
        flat: NDArray[Any]
        if len(rows) == 1:
            flat = rows[0]
        else:
            batch, heads, width, dim = rows.shape
            flat = rows.transpose(1, 0, 2, 3).reshape(heads, batch * width, dim)
        if self.kept is not None:
            flat = flat[:, self.kept.numpy()]
        return flat


@dataclasses.dataclass(eq=False)
class Step:
    """One forward of the model, from its first `update` to its commit.

    Attributes
    ----------
    first, width, rows
        The new columns are [first, first + width) of each of `rows` rows.
    updated, attended
        Model layers whose rows came in, and those whose attention ran.
    validity
        Padding of the columns [0, first + width), None where nothing is padded.
    bases
        Each row's first unpadded column, None where there is none yet.
    placement
        None until the first layer attends.
    """

    first: int
    width: int
    rows: int
    updated: set[int] = dataclasses.field(default_factory=set)
    attended: set[int] = dataclasses.field(default_factory=set)
    validity: torch.Tensor | None = None
    bases: list[int | None] = dataclasses.field(default_factory=list)
    placement: Placement | None = None

    @property
    def columns(self) -> int:
        """Key columns of this step, those before it and its own."""
        return self.first + self.width

    def check_mask(self, layer: int, window: int | None, plan: MaskPlan | None) -> None:
        """Raise unless this layer's mask is one that the native cache applies by itself.

        Parameters
        ----------
        layer, window
            The layer, and its window in the model's config.
        plan
            Its mask; None for plain causal.
        """
        columns = self.first + self.width
        hides = window if window is not None and columns > window else None
        if plan is None and hides is None and self.validity is None:
            return
        if plan is not None and not plan.causal:
            raise NotImplementedError(
                f"layer {layer} has a mask that a MixedCache can't serve: causal and sliding-"
                "window masks are, bidirectional, chunked, block-wise and packed ones and masks "
                "with a function of one's own are not"
            )
        if plan is not None and (plan.columns != columns or not plan.aligned):
            raise ValueError(
                f"layer {layer}: the mask is for {plan.columns} columns, the cache has "
                f"{self.first} and {self.width} new ones"
            )
        masked = plan.window if plan is not None and plan.window_matters() else None
        if masked != hides:
            raise NotImplementedError(
                f"layer {layer} has a window of {window} tokens in the model's config, and "
                f"of {masked} in its mask"
            )
        validity = plan.validity if plan is not None else None
        if validity is not None and tuple(validity.shape) != (self.rows, columns):
            raise ValueError(
                f"attention_mask has the shape {tuple(validity.shape)}, expected [rows, columns "
                f"so far and new] = ({self.rows}, {columns})"
            )
        if self.placement is not None and not _same(validity, self.validity):
            raise ValueError(f"layer {layer} has another padding than the layers before it")

    def place(
        self, plan: MaskPlan | None, earlier: torch.Tensor | None, bases: list[int | None]
    ) -> Placement:
        """Decide which of the columns are stored, and remember their padding.

        Parameters
        ----------
        plan
            The first layer's mask, checked.
        earlier
            Padding of the columns before this step, None where nothing is padded.
        bases
            Each row's first unpadded column so far; empty for an empty cache.
        """
        self.placement = self._placement(plan, earlier, bases or [None] * self.rows)
        return self.placement

    def _placement(
        self, plan: MaskPlan | None, earlier: torch.Tensor | None, bases: list[int | None]
    ) -> Placement:
        validity = plan.validity if plan is not None else None
        self.validity = validity
        if validity is None:
            if earlier is not None:
                raise ValueError(
                    "no attention_mask was given for a cache that has padded columns: give one "
                    "of all columns, those in the cache and the new ones"
                )
            self.bases = [self.first if base is None else base for base in bases]
            return Placement(None, self.rows * self.width)

        before, new = validity[:, : self.first], validity[:, self.first :]
        if not _same(before if not bool(before.all()) else None, earlier):
            raise ValueError(
                "attention_mask pads columns that are in the cache unpadded, or the other way "
                "round: what is padded is decided when a column comes"
            )
        self.bases = [
            self.first + int(first) if base is None and bool(some) else base
            for base, first, some in zip(bases, new.int().argmax(1), new.any(1), strict=True)
        ]
        index = new.reshape(-1).nonzero().squeeze(1)
        count = len(index)
        return Placement(None if count == self.rows * self.width else index, count)

    def positions(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return position and sequence of each token that is stored, int32 [tokens] each."""
        assert self.placement is not None
        bases = np.array([base or 0 for base in self.bases], np.int32)
        columns = np.arange(self.first, self.columns, dtype=np.int32)
        pos = (columns[None, :] - bases[:, None]).reshape(-1)
        seq = np.repeat(np.arange(self.rows, dtype=np.int32), self.width)
        if self.placement.kept is not None:
            index = self.placement.kept.numpy()
            pos, seq = pos[index], seq[index]
        return pos, seq


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
