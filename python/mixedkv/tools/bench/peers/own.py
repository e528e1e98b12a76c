"""mixedkv itself, through its public API, numpy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

import mixedkv as mkv

from ...memory import padded
from ..problem import Problem, Rows, aligned_empty, as_argument
from ..shapes import DEFAULT_FORMATS
from . import Contender, Conversion, Peer, Task

#: Keys in hot where a case is mixed.
HOT_OF_MIXED = 1024
#: Relative errors that a user is promised in f32 arithmetic: keys that stand each for itself, such
#: as f16, and keys in blocks.
PLAIN_TOLERANCE = 1e-4
BLOCK_TOLERANCE = 1e-3
#: Where queries, keys, weights and values are rounded to 8 bits of mantissa.
BF16_TOLERANCE = 1e-2

Computed: TypeAlias = Literal["f32", "bf16"]
Cache: TypeAlias = mkv.MixedKVCache | mkv.UnifiedKVCache


def _geometry(problem: Problem) -> dict[str, Any]:
    _, hkv, d = problem.shape.sizes
    return {"num_layers": 1, "num_kv_heads": hkv, "head_dim": d, "n_pad": 32}


def _fill(cache: Cache, problem: Problem, first: int = 0) -> None:
    """Commit the tokens before the queries, and leave the queries' own pending."""
    start = problem.kv_len - problem.qo_len
    for begin, end, commit in ((first, start, True), (start, problem.kv_len, False)):
        n = end - begin
        if not n:
            continue
        if cache.find_slot(np.arange(begin, end), np.zeros(n, np.int64)) is None:
            raise RuntimeError(f"no room for {n} tokens in {cache!r}")
        cache.store(0, problem.k[:, begin:end], problem.v[:, begin:end])
        if commit:
            cache.commit()


def in_blocks(name: str) -> bool:
    """Whether a format's values share scales."""
    return mkv.formats.info(name).block_values > 1


def one_tier(problem: Problem, kv_type: str, first: int = 0) -> Cache:
    """Return a cache of one tier of that type, from token `first` on, ready to attend."""
    size = padded(problem.kv_len - first)
    cache: Cache
    if in_blocks(kv_type):
        cache = mkv.UnifiedKVCache(**_geometry(problem), size=size, k_type=kv_type, v_type=kv_type)
    else:
        cache = mkv.MixedKVCache(
            **_geometry(problem),
            hot_size=size,
            hot_k_type=kv_type,
            hot_v_type=kv_type,
            quantize=False,
        )
    _fill(cache, problem, first)
    return cache


def two_tiers(problem: Problem, kv_type: str, hot: int) -> Cache:
    """Return a cache with the newest `hot` tokens in hot, the queries' own among them.

    Hot is f16, cold of that type. Everything before the queries goes in as one ubatch longer than
    hot, of which exactly ``floor(threshold * hot_size)`` stay there.
    """
    stay = hot - problem.qo_len
    cold = problem.kv_len - hot
    hot_size = padded(hot)
    cache = mkv.MixedKVCache(
        **_geometry(problem),
        hot_size=hot_size,
        cold_size=max(padded(cold), 32),
        cold_k_type=kv_type,
        cold_v_type=kv_type,
        # Half a cell more, so that rounding can't make it one less.
        threshold=(stay + 0.5) / hot_size,
    )
    _fill(cache, problem)
    stats = cache.stats()
    if (stats.hot_tokens, stats.cold_tokens) != (stay, cold):
        raise RuntimeError(f"{cache!r} should hold {stay} tokens in hot and {cold} in cold")
    return cache


class Own(Peer):
    """mixedkv as a peer of the others."""

    name = "mixedkv"
    version = mkv.__version__

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return attention through the cache by tier, and in one call on plain rows."""
        n, own = problem.kv_len, problem.qo_len
        blocks = [name for name in formats if in_blocks(name)]
        decode = task == "decode"
        contenders = []
        for name in formats:
            if decode and name in blocks:
                contenders.append(self._two(f"mixedkv {name} (cold)", name, problem, own))
            else:
                title = f"mixedkv {name}" if name in blocks else f"mixedkv {name} (hot)"
                contenders.append(self._one(title, name, problem))
        if decode and n > HOT_OF_MIXED and blocks:
            contenders += self._mixed(problem, blocks)
        elif not decode and n > own:
            for name in blocks:
                title = f"mixedkv {own} hot + {n - own} {name}"
                contenders.append(self._two(title, name, problem, own))
        contenders += [self._call(name, problem) for name in formats]
        if not decode and "bf16" in mkv.isa.compute_types():
            for name in formats:
                contenders.append(self._one(f"mixedkv {name}, bf16 math", name, problem, "bf16"))
        return contenders

    def _mixed(self, problem: Problem, formats: Sequence[str]) -> list[Contender]:
        """1024 keys in hot and the rest in cold; then each part alone, to add up."""
        hot, cold = HOT_OF_MIXED, problem.kv_len - HOT_OF_MIXED
        newest, older = problem.keys(cold, problem.kv_len), problem.keys(0, cold)
        mixed = [
            self._two(f"mixedkv {hot} hot + {cold} {name}", name, problem, hot) for name in formats
        ]
        parts = [
            self._one(f"its {hot} hot alone", "f16", newest),
            *(self._two(f"its {cold} {name} alone", name, older, 1) for name in formats),
        ]
        for one in mixed:
            one.role = "mixed"
        for one in parts:
            one.role = "part"
        return [*mixed, *parts]

    def _one(
        self,
        name: str,
        kv_type: str,
        problem: Problem,
        compute_type: Computed = "f32",
    ) -> Contender:
        """Return attention over a cache of one tier."""
        attend = partial(one_tier(problem, kv_type).attend, 0, compute_type=compute_type)
        contender = self._contender(name, kv_type, problem, attend)
        if compute_type == "bf16":
            contender.tolerance, contender.arithmetic = BF16_TOLERANCE, compute_type
        return contender

    def _two(self, name: str, kv_type: str, problem: Problem, hot: int) -> Contender:
        """Return attention over a cache whose newest `hot` tokens lie in hot."""
        attend = partial(two_tiers(problem, kv_type, hot).attend, 0)
        contender = self._contender(name, kv_type, problem, attend)
        contender.kv_bytes += hot * (problem.row_bytes("f16") - problem.row_bytes(kv_type))
        contender.answer = lambda: problem.answer_in(kv_type, hot)
        return contender

    def _call(self, kv_type: str, problem: Problem) -> Contender:
        """Return one call over plain rows, blocks in ggml's layout."""
        k, v = (as_argument(rows, kv_type) for rows in problem.rows(kv_type))
        return self._contender(
            f"mixedkv.attention(), {kv_type} rows",
            kv_type,
            problem,
            lambda q, **options: mkv.attention(q, k, v, causal=True, **options),
        )

    def _contender(
        self, name: str, kv_type: str, problem: Problem, attend: Callable[..., object]
    ) -> Contender:
        q = problem.q
        out = aligned_empty(q.shape, np.float32)
        return Contender(
            peer=self.name,
            name=name,
            kv_type=kv_type,
            against=kv_type,
            kv_bytes=problem.kv_len * problem.row_bytes(kv_type),
            answer=lambda: problem.answer_in(kv_type),
            tolerance=BLOCK_TOLERANCE if in_blocks(kv_type) else PLAIN_TOLERANCE,
            bind=lambda threads: lambda: attend(q, out=out, threads=threads),
            result=lambda: out,
        )

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return conversions of whole arrays into preallocated ones."""

        def conversion(kind: str) -> Conversion:
            source, target = rows.arrays(kind)
            from_, to = kind.split("->")
            x, out = as_argument(source, from_), as_argument(target, to)

            def bind(threads: int) -> Callable[[], object]:
                if isinstance(x, mkv.QuantizedArray):
                    return lambda: x.dequantize(target.dtype, out=target, threads=threads)
                return lambda: mkv.quantize(x, to, out=out, threads=threads)

            return Conversion(self.name, self.name, kind, bind, lambda: target)

        return [conversion(kind) for kind in rows.kinds]


def load() -> Own:
    """Return mixedkv; it is always there."""
    return Own()
