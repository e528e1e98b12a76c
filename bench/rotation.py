"""What rotated and centered rows cost a decode step, and what the presets do, beside a plain cache.

All in one process, taking turns; a second plain cache says how far equal things are apart. All
tokens but the newest lie in cold, as Q4_0. A preset has its own formats and keeps more tokens hot,
in f16, so it stands beside a plain cache of its sizes, too ("plain, hot").

    python bench/rotation.py [--kv 4096] [--isa avx2] [--threads 1]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mixedkv as mkv
import numpy as np
import turns

#: Options beside a plain cache's; of presets, their name.
CACHES: dict[str, dict[str, Any] | str] = {
    "plain": {},
    "plain again": {},
    "rotated": {"rotate": True},
    "centered": {"center_keys": True},
    "both": {"rotate": True, "center_keys": True},
    "plain, hot": "balanced",
    **{name: name for name in ("near_lossless", "balanced", "small", "tiny")},
}
#: What is left of a preset in a plain cache of its sizes.
PLAIN = {"cold_k_type": "q4_0", "cold_v_type": "q4_0", "rotate": False, "center_keys": False}


def filled(heads: tuple[int, int, int], kv: int, name: str) -> Any:
    """Make a cache of kv - 1 tokens, with a slot of one more pending."""
    options = CACHES[name]
    _, hkv, dim = heads
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "num_kv_heads": hkv,
        "head_dim": dim,
        "cold_size": -(-kv // 32) * 32,
    }
    if isinstance(options, str):
        changes = PLAIN if name.startswith("plain") else {}
        cache = mkv.MixedKVCache.preset(options, **sizes, **changes)
    else:
        cache = mkv.MixedKVCache(hot_size=64, **sizes, **options)
    rng = np.random.default_rng(0)
    for first, n in ((0, kv - 1), (kv - 1, 1)):
        assert cache.find_slot(pos=range(first, first + n), seq_id=[0] * n)
        rows = rng.standard_normal((2, hkv, n, dim), dtype=np.float32)
        cache.store(0, rows[0], rows[1])
        if first == 0:
            cache.commit()
    return cache


def main() -> None:
    """Print microseconds of one attend, the least of all turns' medians, and ratios to plain."""
    args = turns.parse(turns.parser(__doc__))
    for heads in turns.SHAPES:
        rng = np.random.default_rng(1)
        q = rng.standard_normal((heads[0], 1, heads[2]), dtype=np.float32)
        out = np.empty_like(q)
        caches = {name: filled(heads, args.kv, name) for name in CACHES}
        times = turns.Times(
            {name: partial(cache.attend, 0, q, out=out) for name, cache in caches.items()}, args
        )
        print(turns.title(heads, args))
        print(f"{'':14} {'us':>7} {'over plain':>10} {'over hot':>8}  cold tokens")
        for name, cache in caches.items():
            over = isinstance(CACHES[name], str) and f"{times.ratio(name, 'plain, hot'):.3f}"
            print(
                f"{name:14} {times.best(name):7.1f} {times.ratio(name, 'plain'):10.3f}"
                f" {over or '':>8}  {cache.stats().cold_tokens}"
            )


if __name__ == "__main__":
    main()
