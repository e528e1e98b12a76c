"""The cache of two tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from .verbs import KVCache


class MixedKVCache(KVCache):
    """A hot tier for new tokens and a cold one that older tokens move to.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim, head_dim_v
        The model's geometry; head_dim_v None: head_dim. Multiples of 32 where a type is q4_0.
    hot_size, cold_size
        Cells (tokens) of all sequences together, multiples of n_pad.
    group_size
        Most tokens moved in one batch.
    threshold
        Tokens move when more than ``floor(threshold * hot_size)`` hot cells are in use:
        ``min(used // 4, group_size)`` of them, oldest first, until that is so no longer.
    n_pad
        What both sizes are multiples of.
    n_seq_max
        Sequence ids are 0 to n_seq_max - 1.
    hot_k_type, hot_v_type, cold_k_type, cold_v_type
        "f32", "f16" or "q4_0".
    sink_tokens
        First positions of each sequence that never leave hot.
    window_left
        attend's default window; -1: none.
    layer_filter
        Layers to hold: a callable on the layer's index, or the indices; None: all.
    quantize
        False: one tier, no moves; cold is not allocated.
    hot_keep, rotate, rope
        Not there yet: anything but the default raises NotImplementedError.

    Raises
    ------
    ValueError
        Naming the parameter and its value; also where the pins of all sequences
        (sink_tokens * n_seq_max) reach the trigger's level.
    """

    #: Parameters that a later version gives a meaning, with the one value that they take now.
    _LATER: ClassVar[dict[str, Any]] = {"hot_keep": 0, "rotate": False, "rope": None}

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        hot_size: int = 1024,
        cold_size: int = 4096,
        group_size: int = 256,
        threshold: float = 0.8,
        n_pad: int = 32,
        n_seq_max: int = 1,
        hot_k_type: str = "f16",
        hot_v_type: str = "f16",
        cold_k_type: str = "q4_0",
        cold_v_type: str = "q4_0",
        sink_tokens: int = 0,
        hot_keep: int = 0,
        rotate: bool = False,
        window_left: int = -1,
        rope: None = None,
        layer_filter: Callable[[int], bool] | Iterable[int] | None = None,
        quantize: bool = True,
    ) -> None:
        refuse_later(hot_keep=hot_keep, rotate=rotate, rope=rope)
        self._create(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            hot_size=hot_size,
            cold_size=cold_size,
            group_size=group_size,
            threshold=threshold,
            n_pad=n_pad,
            n_seq_max=n_seq_max,
            types=(hot_k_type, hot_v_type, cold_k_type, cold_v_type),
            sink_tokens=sink_tokens,
            window_left=window_left,
            layer_filter=layer_filter,
            quantize=quantize,
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"MixedKVCache(num_layers={self._num_layers}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, hot={stats.hot_tokens}/{stats.hot_size}, "
            f"cold={stats.cold_tokens}/{stats.cold_size})"
        )


def refuse_later(**parameters: Any) -> None:
    """Refuse parameters that have no meaning yet, where they are not the default."""
    for name, value in parameters.items():
        default = MixedKVCache._LATER[name]
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not there yet: it must be {default}, got {value}")
