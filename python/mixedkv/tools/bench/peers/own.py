"""mixedkv itself, through its public API, numpy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

import mixedkv as mkv

from ...memory import padded
from ..problem import KINDS, Problem, Rows, aligned_empty
from . import Contender, Conversion, Peer, Task

#: Keys in hot where a case is mixed.
HOT_OF_MIXED = 1024
#: Relative errors that a user is promised: f16 keys in f32 arithmetic, Q4_0 keys.
F16_TOLERANCE = 1e-4
Q4_0_TOLERANCE = 1e-3
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


def one_tier(problem: Problem, kv_type: str, first: int = 0) -> Cache:
    """Return a cache of one tier of that type, from token `first` on, ready to attend."""
    size = padded(problem.kv_len - first)
    cache: Cache
    if kv_type == "f16":
        cache = mkv.MixedKVCache(**_geometry(problem), hot_size=size, quantize=False)
    else:
        cache = mkv.UnifiedKVCache(**_geometry(problem), size=size, k_type=kv_type, v_type=kv_type)
    _fill(cache, problem, first)
    return cache


def two_tiers(problem: Problem, hot: int) -> Cache:
    """Return a cache with the newest `hot` tokens in hot, the queries' own among them.

    Everything before the queries goes in as one ubatch longer than hot, of which exactly
    ``floor(threshold * hot_size)`` stay there.
    """
    stay = hot - problem.qo_len
    cold = problem.kv_len - hot
    hot_size = padded(hot)
    cache = mkv.MixedKVCache(
        **_geometry(problem),
        hot_size=hot_size,
        cold_size=max(padded(cold), 32),
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

    def attention(self, task: Task, problem: Problem) -> list[Contender]:
        """Return attention through the cache by tier, and in one call on plain rows."""
        n, own = problem.kv_len, problem.qo_len
        contenders = [self._one("mixedkv f16 (hot)", "f16", problem)]
        if task == "decode":
            contenders.append(self._two("mixedkv q4_0 (cold)", problem, own))
            if n > HOT_OF_MIXED:
                contenders += self._mixed(problem)
        else:
            contenders.append(self._one("mixedkv q4_0", "q4_0", problem))
            if n > own:
                contenders.append(self._two(f"mixedkv {own} hot + {n - own} cold", problem, own))
        contenders += [self._call("f16", problem), self._call("q4_0", problem)]
        if task == "prefill" and "bf16" in mkv.isa.compute_types():
            for kv_type in ("f16", "q4_0"):
                name = f"mixedkv {kv_type}, bf16 math"
                contenders.append(self._one(name, kv_type, problem, "bf16"))
        return contenders

    def _mixed(self, problem: Problem) -> list[Contender]:
        """1024 keys in hot and the rest in cold; then each part alone, to add up."""
        hot, cold = HOT_OF_MIXED, problem.kv_len - HOT_OF_MIXED
        mixed = self._two(f"mixedkv {hot} hot + {cold} cold", problem, hot)
        mixed.role = "mixed"
        newest, older = problem.keys(cold, problem.kv_len), problem.keys(0, cold)
        parts = [
            self._one(f"its {hot} hot alone", "f16", newest),
            self._two(f"its {cold} cold alone", older, 1),
        ]
        for part in parts:
            part.role = "part"
        return [mixed, *parts]

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

    def _two(self, name: str, problem: Problem, hot: int) -> Contender:
        """Return attention over a cache whose newest `hot` tokens lie in hot."""
        contender = self._contender(
            name, "q4_0", problem, partial(two_tiers(problem, hot).attend, 0)
        )
        contender.kv_bytes += hot * (problem.row_bytes("f16") - problem.row_bytes("q4_0"))
        contender.answer = lambda: problem.answer_q4_0(hot)
        return contender

    def _call(self, kv_type: str, problem: Problem) -> Contender:
        """Return one call over plain rows, Q4_0 ones in ggml's layout."""
        k, v = (problem.k, problem.v) if kv_type == "f16" else (problem.k_q4_0, problem.v_q4_0)
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
        f16 = kv_type == "f16"
        return Contender(
            peer=self.name,
            name=name,
            kv_type=kv_type,
            against=kv_type,
            kv_bytes=problem.kv_len * problem.row_bytes(kv_type),
            answer=problem.answer_f16 if f16 else problem.answer_q4_0,
            tolerance=F16_TOLERANCE if f16 else Q4_0_TOLERANCE,
            bind=lambda threads: lambda: attend(q, out=out, threads=threads),
            result=lambda: out,
        )

    def conversions(self, rows: Rows) -> list[Conversion]:
        """Return conversions of whole arrays into preallocated ones."""

        def conversion(kind: str) -> Conversion:
            source, target = rows.arrays(kind)

            def bind(threads: int) -> Callable[[], object]:
                if kind.endswith("q4_0"):
                    return lambda: mkv.quantize_q4_0(source, out=target, threads=threads)
                dtype = target.dtype
                return lambda: mkv.dequantize_q4_0(source, dtype=dtype, out=target, threads=threads)

            return Conversion(self.name, self.name, kind, bind, lambda: target)

        return [conversion(kind) for kind in KINDS]


def load() -> Own:
    """Return mixedkv; it is always there."""
    return Own()
