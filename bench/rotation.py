"""What rotated rows cost a decode step: attention of a cache made with rotate=True, and without.

Both in one process, taking turns; a third row without says how far equal things are apart.

    python bench/rotation.py [--kv 4096] [--isa avx2] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import mixedkv as mkv
import numpy as np

SHAPES = [(32, 8, 128), (9, 3, 64)]  # query heads, kv heads, head_dim


def filled(heads: tuple[int, int, int], kv: int, *, rotate: bool) -> Any:
    """Make a cache whose tokens lie in cold but for a few, with a slot of one token pending."""
    _, hkv, dim = heads
    cache = mkv.MixedKVCache(
        num_layers=1,
        num_kv_heads=hkv,
        head_dim=dim,
        hot_size=64,
        cold_size=-(-kv // 32) * 32,
        rotate=rotate,
    )
    rng = np.random.default_rng(0)
    for first, n in ((0, kv - 1), (kv - 1, 1)):
        assert cache.find_slot(pos=range(first, first + n), seq_id=[0] * n)
        rows = rng.standard_normal((2, hkv, n, dim), dtype=np.float32)
        cache.store(0, rows[0], rows[1])
        if first == 0:
            cache.commit()
    return cache


def main() -> None:
    """Print microseconds of one attend, the least of all turns' medians, and the ratio to plain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv", type=int, default=4096)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    if args.isa:
        mkv.isa.select(args.isa)
    mkv.set_num_threads(args.threads)
    for heads in SHAPES:
        rng = np.random.default_rng(1)
        q = rng.standard_normal((heads[0], 1, heads[2]), dtype=np.float32)
        out = np.empty_like(q)
        caches = {name: filled(heads, args.kv, rotate=name == "rotated") for name in NAMES}
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(args.turns):
            for name, cache in caches.items():
                laps = []
                for _ in range(30):
                    begin = time.perf_counter()
                    cache.attend(0, q, out=out)
                    laps.append(time.perf_counter() - begin)
                times[name].append(float(np.median(laps)))
        best = {name: 1e6 * min(laps) for name, laps in times.items()}
        plain = best["plain"]
        print(
            f"{mkv.isa.active()} {heads} kv {args.kv} threads {args.threads}: "
            + ", ".join(f"{name} {us:.1f} us ({us / plain:.3f})" for name, us in best.items())
        )


NAMES = ("plain", "rotated", "plain again")

if __name__ == "__main__":
    main()
