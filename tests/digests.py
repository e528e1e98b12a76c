"""Digests of what every op computes, on every instruction set: to show that all bits are kept.

Run it over two installed versions on one machine and compare what it prints:

    python tests/digests.py > before.txt
    python tests/digests.py > after.txt
    diff before.txt after.txt

A line is the instruction set, the case, and a SHA-256 of the result's bytes. Only options that have
kept their names are used; formats that a version has not got yet are left out. Results depend on
the machine's libm, so none are kept in the tree.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import mixedkv as mkv
import numpy as np

KINDS = ("f32", "f16", "q4_0")
MORE_KINDS = ("q8_0", "bf16", "iq4_nl", "nl4", "nl3")
Case = tuple[str, list[np.ndarray]]


def rows(rng: np.random.Generator, kind: str, *shape: int) -> Any:
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., ::17] *= 6  # outlier channels, as models have them
    if kind == "f16":
        return x.astype(np.float16)
    if kind in MORE_KINDS:
        return mkv.quantize(x, kind)
    return mkv.quantize_q4_0(x) if kind == "q4_0" else x


def conversions(rng: np.random.Generator) -> Iterator[Case]:
    for n, dtype in itertools.product((32, 64, 96, 128, 4096), (np.float32, np.float16)):
        x = (rng.standard_normal((37, n)) * 3).astype(dtype)
        x[3] = 0
        x[5, ::2] = x[5, 0]
        b = mkv.quantize_q4_0(x)
        y = [mkv.dequantize_q4_0(b, dtype=d) for d in (np.float32, np.float16)]
        yield f"q4_0 {n} {np.dtype(dtype).name}", [b, *y]


def attention(rng: np.random.Generator) -> Iterator[Case]:
    shapes = [(1, 4, 2, 1, 700, 64), (2, 3, 1, 5, 130, 32), (1, 8, 2, 40, 300, 96)]
    shapes += [(1, 9, 3, 1, 2100, 128), (1, 2, 2, 129, 257, 64)]
    for (b, hq, hkv, lq, lkv, d), k_kind, v_kind in itertools.product(shapes, KINDS, KINDS):
        q = rows(rng, "f32", b, hq, lq, d)
        k, v = rows(rng, k_kind, b, hkv, lkv, d), rows(rng, v_kind, b, hkv, lkv, d)
        mask = np.where(rng.random((lq, lkv)) < 0.2, -np.inf, rng.standard_normal((lq, lkv)))
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "causal": {"causal": True, "window_left": 100},
            "mask": {"mask": mask.astype(np.float32), "logits_soft_cap": 20.0},
            "alibi": {"causal": True, "alibi_slopes": np.linspace(0.1, 1, hq, dtype=np.float32)},
            "bf16": {"causal": True, "compute_type": "bf16"},
        }
        for name, kwargs in options.items():
            out = mkv.attention(q, k, v, return_lse=True, **kwargs)
            yield f"attention {(b, hq, hkv, lq, lkv, d)} {k_kind} {v_kind} {name}", list(out)
        state = mkv.AttentionState(hq, lq, d, b)
        for begin in range(0, lkv, 90):
            part = slice(begin, begin + 90)
            state.update(q, k[:, :, part], v[:, :, part])
        yield f"state {(b, hq, hkv, lq, lkv, d)} {k_kind} {v_kind}", [state.ms, state.finalize()]


def cache(rng: np.random.Generator) -> Iterator[Case]:
    for cold, hot in itertools.product(KINDS, KINDS):
        for d, dtype in ((64, "f32"), (128, "f16")):
            c = mkv.MixedKVCache(
                num_layers=2, num_kv_heads=2, head_dim=d, hot_size=64, cold_size=512,
                group_size=32, n_pad=16, n_seq_max=3, window_left=-1,
                hot_k_type=hot, hot_v_type=hot, cold_k_type=cold, cold_v_type=cold,
            )  # fmt: skip
            results = []
            at = [0, 0, 0]
            for step in range(60):
                seqs = [[0] * 90, [1] * 20, [0, 1, 2], [2, 2, 1], [0]][min(step, step % 5)]
                if step >= 5 and len(seqs) > 3:
                    seqs = [1]
                pos = []
                for s in seqs:
                    pos.append(at[s])
                    at[s] += 1
                if c.find_slot(pos, seqs) is None:
                    break
                for layer in range(2):
                    n = len(seqs)
                    c.store(layer, rows(rng, dtype, 2, n, d), rows(rng, dtype, 2, n, d))
                    results.append(c.attend(layer, rows(rng, "f32", 6, n, d)))
                c.commit()
            c.seq_cp(0, 2)
            results += [c.keys(1, 0), c.values(0, 1), c.positions(2)]
            yield f"cache {hot} {cold} {d} {dtype}", results


def more_kinds(rng: np.random.Generator) -> Iterator[Case]:
    kinds = [kind for kind in MORE_KINDS if kind in mkv.formats.available()]
    for kind in kinds:
        x = (rng.standard_normal((37, 192)) * 3).astype(np.float32)
        x[3] = 0
        x[5, ::2] = x[5, 0]
        for values in (x, x.astype(np.float16)):
            a = mkv.quantize(values, kind)
            yield f"{kind} {values.dtype}", [a.data, a.dequantize(), a.dequantize(np.float16)]
        for lq, lkv, d in ((1, 700, 64), (5, 130, 128), (40, 300, 64)):
            q = rows(rng, "f32", 1, 4, lq, d)
            packed, plain = rows(rng, kind, 1, 2, lkv, d), rows(rng, "f16", 1, 2, lkv, d)
            for name, (k, v) in {"k": (packed, plain), "v": (plain, packed)}.items():
                for compute_type in ("f32", "bf16"):
                    out = mkv.attention(q, k, v, causal=True, compute_type=compute_type)
                    yield f"attention {(lq, lkv, d)} {kind} {name} {compute_type}", [out]
    for kind, changed in itertools.product(kinds, ({}, {"rotate": True}, {"center_keys": True})):
        c = mkv.MixedKVCache(
            num_layers=1, num_kv_heads=2, head_dim=64, hot_size=64, cold_size=512, group_size=32,
            n_pad=16, cold_k_type=kind, cold_v_type=kind, **changed,
        )  # fmt: skip
        results = []
        for n in (90, *[1] * 70, 40, 1):
            first = c.seq_pos_max(0) + 1
            assert c.find_slot(range(first, first + n), [0] * n) is not None
            c.store(0, rows(rng, "f32", 2, n, 64), rows(rng, "f32", 2, n, 64))
            results.append(c.attend(0, rows(rng, "f32", 6, n, 64)))
            c.commit()
        yield f"cache {kind} {' '.join(changed)}", [*results, c.keys(0, 0), c.values(0, 0)]


def main() -> None:
    for isa in mkv.isa.available():
        mkv.isa.select(isa)
        for cases in (conversions, attention, cache, more_kinds):
            for name, arrays in cases(np.random.default_rng(7)):
                digest = hashlib.sha256()
                for array in arrays:
                    digest.update(np.ascontiguousarray(array).tobytes())
                print(isa, name, digest.hexdigest()[:24])
                sys.stdout.flush()


if __name__ == "__main__":
    main()
