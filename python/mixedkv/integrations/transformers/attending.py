"""The attention of one layer in one step, from the model's tensors to the native cache and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mixedkv._arrays import check_threads
from mixedkv._options import ComputeType, check_compute_type

from .batch import Batch
from .groups import Group
from .masks import MaskPlan
from .records import Observation
from .rows import Handle, to_array
from .steps import Step

_SERIAL_WORK = 5_000_000
"""Calls with fewer multiply-adds run on the caller's thread alone, unless the user says otherwise.
Between two layers, mixedkv's workers fall asleep and torch's poll for work on every core: to wake
one, wait until it has got a core, and give that back costs more than it can save in such a call."""


class LayerAttention:
    """Attends one layer of one step.

    Parameters
    ----------
    groups
        The layers with keys, in groups.
    windows
        Each layer's window in the model's config, None where it has none.
    threads
        Of each call; None for the default.
    compute_type
        "f32", "bf16" or "auto".
    """

    def __init__(
        self,
        groups: list[Group],
        windows: list[int | None],
        threads: int | None,
        compute_type: ComputeType,
    ) -> None:
        check_threads(threads)
        check_compute_type(compute_type)
        self.threads = threads
        self.compute_type = compute_type
        self._windows = windows
        self._group_of = {layer: group for group in groups for layer in group.layers}

    def __call__(
        self,
        step: Step,
        batch: Batch,
        handle: Handle,
        query: torch.Tensor,
        plan: MaskPlan | None,
        options: dict[str, Any],
        for_layer: int,
        observer: Callable[[Observation], None] | None,
    ) -> torch.Tensor:
        """Store the handle's rows, if they are not yet, and attend: see `MixedCache.attend`."""
        layer = handle.layer
        step.check_mask(layer, self._windows[layer], plan)
        rows, heads, queries, _ = query.shape
        # Layers that reuse keys may ask for the last tokens alone: those are the ones that count.
        width = step.width
        if rows != step.rows or (queries != width and not (handle.stored and queries < width)):
            raise ValueError(
                f"layer {layer} has {rows} rows of {queries} queries for {step.rows} rows of "
                f"{width} new keys"
            )
        if queries < width:
            query = torch.nn.functional.pad(query, (0, 0, width - queries, 0))
        placement = step.placement
        if placement is None:
            placement = step.place(plan, batch.validity, batch.bases)
        group = self._group_of[layer]
        native = group.store(step, handle, batch.room_for)
        assert group.shape is not None
        if not placement.num_tokens:
            return query.new_zeros(rows, queries, heads, group.shape[2])

        window = self._windows[layer]
        options["window_left"] = None if window is None else window - 1
        options["threads"] = self._threads_for(step, heads, group.shape, window)
        options["compute_type"] = self.compute_type
        place = group.place[layer]
        tokens = placement.cut(to_array(query))
        # Cut as arrays, made a tensor at the end: torch takes microseconds for each of these.
        out = np.empty((rows * width, heads, group.shape[2]), np.float32)
        if placement.kept is None:
            native.attend(place, tokens, out=out.transpose(1, 0, 2), **options)
        else:
            out.fill(0.0)
            out[placement.kept.numpy()] = native.attend(place, tokens, **options).transpose(1, 0, 2)
        result = torch.from_numpy(out.reshape(rows, width, heads, group.shape[2]))
        if queries < width:
            result = result[:, width - queries :].contiguous()
        if result.dtype != query.dtype:
            result = result.to(query.dtype)
        if observer is not None:
            observer(
                Observation(
                    layer=for_layer,
                    first=step.first,
                    width=width,
                    rows=rows,
                    query=query[:, :, width - queries :],
                    out=result,
                    native=native,
                    place=place,
                    kept=placement.kept,
                    options=options,
                )
            )
        return result

    def _threads_for(
        self, step: Step, heads: int, shape: tuple[int, int, int], window: int | None
    ) -> int | None:
        """Give the threads of a layer's attention, None for the default."""
        if self.threads is not None:
            return self.threads
        keys = step.first + step.width
        if window is not None:
            keys = min(keys, window + step.width)
        work = step.rows * step.width * keys * heads * (shape[1] + shape[2])
        return 1 if work < _SERIAL_WORK else None
