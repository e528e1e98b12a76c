"""The cache of one tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .mixed import refuse_later
from .verbs import KVCache


class UnifiedKVCache(KVCache):
    """One tier, the same verbs: a standard cache to compare with.

    Parameters
    ----------
    size
        Cells (tokens) of all sequences together, a multiple of n_pad.
    k_type, v_type
        "f32", "f16" or "q4_0"; with q4_0 a token's rows are quantised as they are stored.
    num_layers, num_kv_heads, head_dim, head_dim_v, n_pad, n_seq_max, window_left, layer_filter
        As in :class:`MixedKVCache`.
    rope
        Not there yet: anything but None raises NotImplementedError.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        size: int = 1024,
        n_pad: int = 32,
        n_seq_max: int = 1,
        k_type: str = "f16",
        v_type: str = "f16",
        window_left: int = -1,
        rope: None = None,
        layer_filter: Callable[[int], bool] | Iterable[int] | None = None,
    ) -> None:
        refuse_later(rope=rope)
        self._create(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            hot_size=size,
            cold_size=n_pad,
            group_size=1,
            threshold=1.0,
            n_pad=n_pad,
            n_seq_max=n_seq_max,
            types=(k_type, v_type, "f16", "f16"),
            sink_tokens=0,
            window_left=window_left,
            layer_filter=layer_filter,
            quantize=False,
            size_names=("size", "k_type", "v_type"),
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"UnifiedKVCache(num_layers={self._num_layers}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, cells={stats.hot_tokens}/{stats.hot_size})"
        )
