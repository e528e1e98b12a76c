"""mixedkv's own op over a step, as a cache runs it.

Where keys or values in blocks take part, a cache does not attend rows of blocks but tiles of many
tokens, packed, and has kernels of its own for them. So the step's keys and values are put into a
cache, in the tiers and formats that they were recorded in, and attended there. Hot rows are stored
as they are. Cold ones have to come from hot: stored is what becomes them on the way, their values
or, where those do not, what they were while hot. A cache takes no mask but shows a token what
stands before it. Steps that this can't give again are attended by the op over plain rows, and
`OwnOp.plain` says why.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

from .arithmetic import attend_mixedkv, sees_quantised
from .follow import Before
from .format import LayerInfo, StepData
from .layout import watched
from .stored import Rows, as_float32, converted, data_of, format_of, of_format, typed


class OwnOp:
    """mixedkv's op over one step, on whatever instruction set is selected when it attends.

    Parameters
    ----------
    before
        The cold rows as they were while hot, where the trace has them.

    Attributes
    ----------
    plain
        Why a step with blocks is attended over plain rows, and not in a cache; None: it is attended
        in one, or no query sees any.
    """

    def __init__(self, data: StepData, info: LayerInfo, before: Before | None = None) -> None:
        self.data = data
        self.info = info
        self.plain: str | None = None
        self._order: _Order | None = None
        if not sees_quantised(data):
            return
        if data.stored:
            self.plain = "it holds what rotated or centered rows stand for, not the rows"
            return
        found = _order_of(data)
        if isinstance(found, str):
            self.plain = found
            return
        cold = _cold_sources(data, found, before)
        if cold is None:
            self.plain = "its rows are not as a cache of mixedkv stores them"
        else:
            self._order = found
            self._fit_scales, self._cold = cold

    def attend(self) -> NDArray[np.float32]:
        """Compute the output [n, Hq, Dv]."""
        if self._order is None:
            return attend_mixedkv(self.data, self.info)
        cache = filled_cache(self.data, self._order, self._cold, fit_scales=self._fit_scales)
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


def _rows(stored: Rows, at: NDArray[np.intp]) -> Rows:
    """Give rows of some tokens."""
    return of_format(np.ascontiguousarray(data_of(stored)[:, at]), stored)


def _cold_sources(
    data: StepData, order: _Order, before: Before | None
) -> tuple[bool, tuple[Rows, ...]] | None:
    """Give rows whose values a cache has in cold as they were recorded, and its fit_scales.

    None: no such rows are known.
    """
    for fit_scales in (False, True):
        sources = _sources_that(fit_scales, data, order, before)
        if sources is not None:
            return fit_scales, sources
    return None


def _sources_that(
    fit_scales: bool, data: StepData, order: _Order, before: Before | None
) -> tuple[Rows, ...] | None:
    if data.k_quant is None or data.v_quant is None:
        return ()
    sources = []
    for cold, hot, known in (
        (data.k_quant, data.k, before and before.k),
        (data.v_quant, data.v, before and before.v),
    ):
        wanted = typed(_rows(cold, order.cold))
        tried = [wanted, *([] if known is None else [_rows(known, order.cold)])]
        name = format_of(hot).name
        fitting = [rows for rows in tried if _becomes(rows, name, wanted, fit_scales)]
        if not fitting:
            return None
        sources.append(fitting[0])
    return tuple(sources)


def _becomes(rows: Rows, hot: str, cold: Rows, fit_scales: bool) -> bool:
    """Whether rows that pass through the hot format have the values of these cold ones.

    So do what mixedkv moved, and Q4_0 that was quantised as ggml does it, where a block's largest
    value is 8 times its scale; other programs may choose scales in other ways.
    """
    name, values = format_of(cold).name, as_float32(cold)
    if not np.isfinite(values).all() and name in mkv.formats.packed():
        return False
    try:
        moved = converted(converted(rows, hot, fit_scales=fit_scales), name, fit_scales=fit_scales)
    except ValueError:  # no finite numbers on the way
        return False
    return np.array_equal(as_float32(moved), values, equal_nan=True)


def filled_cache(
    data: StepData, order: _Order, cold_rows: tuple[Rows, ...], *, fit_scales: bool = False
) -> mkv.MixedKVCache | mkv.UnifiedKVCache:
    """Give a cache that holds the step's rows in their tiers, the queries' own tokens pending.

    `cold_rows` are the keys and values that become the cold ones; none of a step without these.
    """
    n, hot, cold = data.q.shape[1], len(order.hot), len(order.cold)
    options: dict[str, Any] = {
        "num_layers": 1,
        "num_kv_heads": data.k.shape[0],
        "head_dim": data.q.shape[2],
        "head_dim_v": data.out.shape[2],
        "n_pad": 1,
        "fit_scales": fit_scales,
    }
    k_type, v_type = format_of(data.k).name, format_of(data.v).name
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
            cold_k_type=format_of(data.k_quant).name,
            cold_v_type=format_of(data.v_quant).name,
        )
        k, v = cold_rows
        cache.append(range(cold), [0] * cold, [k], [v])
    else:
        cache = mkv.UnifiedKVCache(**options, size=hot, k_type=k_type, v_type=v_type)
    k, v = (typed(_rows(rows, order.hot)) for rows in (data.k, data.v))
    old = hot - n
    if old:
        cache.append(range(cold, cold + old), [0] * old, [k[:, :old]], [v[:, :old]])
    if cache.find_slot(range(cold + old, cold + hot), [0] * n) is None:
        raise RuntimeError(f"a cache for {hot} hot and {cold} cold tokens has no room for them")
    cache.store(0, k[:, old:], v[:, old:])
    return cache
