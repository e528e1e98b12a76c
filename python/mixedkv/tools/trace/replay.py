"""mixedkv's own op over a step, as a cache runs it.

Where Q4_0 takes part, a cache does not attend rows of blocks but tiles of many tokens, packed, and
has kernels of its own for them. So the step's keys and values are put into a cache, in the tiers
and types that they were recorded in, and attended there. A cache takes no blocks and no mask: it
quantises what it is given, and shows a token what stands before it. Steps that this can't give
again are attended by the op over plain rows, and `OwnOp.plain` says why.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from .arithmetic import attend_mixedkv, sees_quantised
from .format import LayerInfo, StepData
from .layout import as_float32, watched

_TYPES = {"float32": "f32", "float16": "f16", "uint8": "q4_0"}


class OwnOp:
    """mixedkv's op over one step, on whatever instruction set is selected when it attends.

    Attributes
    ----------
    plain
        Why a step with Q4_0 is attended over plain rows, and not in a cache; None: it is attended
        in one, or no query sees Q4_0.
    """

    def __init__(self, data: StepData, info: LayerInfo) -> None:
        self.data = data
        self.info = info
        self.plain: str | None = None
        self._order: _Order | None = None
        if not sees_quantised(data):
            return
        found = _order_of(data)
        if isinstance(found, str):
            self.plain = found
        elif not _stored_again(data, found):
            self.plain = "its rows are not as a cache of mixedkv stores them"
        else:
            self._order = found

    def attend(self) -> NDArray[np.float32]:
        """Compute the output [n, Hq, Dv]."""
        if self._order is None:
            return attend_mixedkv(self.data, self.info)
        cache = filled_cache(self.data, self._order)
        sinks = None if self.info.sinks is None else np.array(self.info.sinks, np.float32)
        out = cache.attend(
            0,
            self.data.q,
            sm_scale=self.info.sm_scale,
            logits_soft_cap=self.info.logits_soft_cap,
            sinks=sinks,
        )
        watched("mixedkv's [head, query, dim]", out)
        return watched("mixedkv's [query, head, dim]", np.asarray(out).transpose(1, 0, 2))


class _Order(NamedTuple):
    """In which order tokens go into a cache, so that each query sees what its mask shows it.

    Indices of keys that some query sees; the last n hot ones are the queries' own tokens.
    """

    cold: NDArray[np.intp]
    hot: NDArray[np.intp]


def _order_of(data: StepData) -> _Order | str:
    """Find that order, or say why there is none.

    A cache shows query i all tokens up to its own: of the queries, those from some one on see a
    key. The first query's own is any hot key that all of them see.
    """
    n = data.q.shape[1]
    masks = [data.mask] if data.mask_quant is None else [data.mask_quant, data.mask]
    firsts = []
    for mask in masks:
        seen = ~np.isneginf(mask)
        if np.any(mask[seen]):
            return "the mask adds numbers"
        first = n - seen.sum(0)  # the first query that sees a key; n: none does
        if not np.array_equal(seen, np.arange(n)[:, None] >= first):
            return "queries do not see all keys up to their own"
        firsts.append(first)
    hot, cold = firsts[-1], firsts[0] if len(firsts) == 2 else np.zeros(0, np.intp)
    if np.any((cold > 0) & (cold < n)):
        return "a cold key is hidden from some queries, and not from all"
    old = np.flatnonzero(hot == 0)
    new = np.flatnonzero((hot > 0) & (hot < n))
    new = new[np.argsort(hot[new])]
    if not len(old) or not np.array_equal(hot[new], np.arange(1, n)):
        return "a query has no hot key of its own"
    return _Order(np.flatnonzero(cold == 0), np.concatenate([old, new]))


def _rows(stored: NDArray[Any], at: NDArray[np.intp]) -> NDArray[np.float32]:
    return as_float32(np.ascontiguousarray(stored[:, at]))


def _stored_again(data: StepData, order: _Order) -> bool:
    """Whether a cache that is given what the rows stand for stores the same values again.

    So it does for Q4_0 that was quantised as ggml does it, where a block's largest value is 8 times
    its scale; other programs may choose scales in other ways.
    """
    for stored, at in ((data.k, order.hot), (data.v, order.hot)):
        if not _survives(_rows(stored, at), stored.dtype):
            return False
    if data.k_quant is None or data.v_quant is None:
        return True
    # A token is hot first: its row passes through that type.
    return all(
        _survives(_rows(stored, order.cold), hot.dtype, stored.dtype)
        for stored, hot in ((data.k_quant, data.k), (data.v_quant, data.v))
    )


def _survives(rows: NDArray[np.float32], *types: np.dtype[Any]) -> bool:
    """Whether float32 rows are the same after passing through these types."""
    now = rows
    for dtype in types:
        if dtype == np.uint8:
            if not np.isfinite(now).all():
                return False
            now = mkv.dequantize_q4_0(mkv.quantize_q4_0(now))
        else:
            with np.errstate(over="ignore"):
                now = now.astype(dtype).astype(np.float32)
    return np.array_equal(now, rows, equal_nan=True)


def filled_cache(data: StepData, order: _Order) -> mkv.MixedKVCache | mkv.UnifiedKVCache:
    """Give a cache that holds the step's rows in their tiers, the queries' own tokens pending."""
    n, hot, cold = data.q.shape[1], len(order.hot), len(order.cold)
    options: dict[str, Any] = {
        "num_layers": 1,
        "num_kv_heads": data.k.shape[0],
        "head_dim": data.q.shape[2],
        "head_dim_v": data.out.shape[2],
        "n_pad": 1,
    }
    k_type, v_type = _TYPES[data.k.dtype.name], _TYPES[data.v.dtype.name]
    cache: mkv.MixedKVCache | mkv.UnifiedKVCache
    if cold and data.k_quant is not None and data.v_quant is not None:
        # Hot has room for the hot tokens alone, and gives way to them one token at a time.
        cache = mkv.MixedKVCache(
            **options,
            hot_size=hot,
            cold_size=cold,
            group_size=1,
            threshold=1.0,
            hot_k_type=k_type,
            hot_v_type=v_type,
            cold_k_type=_TYPES[data.k_quant.dtype.name],
            cold_v_type=_TYPES[data.v_quant.dtype.name],
        )
        k, v = _rows(data.k_quant, order.cold), _rows(data.v_quant, order.cold)
        cache.append(range(cold), [0] * cold, [k], [v])
    else:
        cache = mkv.UnifiedKVCache(**options, size=hot, k_type=k_type, v_type=v_type)
    k, v = _rows(data.k, order.hot), _rows(data.v, order.hot)
    old = hot - n
    if old:
        cache.append(range(cold, cold + old), [0] * old, [k[:, :old]], [v[:, :old]])
    if cache.find_slot(range(cold + old, cold + hot), [0] * n) is None:
        raise RuntimeError(f"a cache for {hot} hot and {cold} cold tokens has no room for them")
    cache.store(0, k[:, old:], v[:, old:])
    return cache
