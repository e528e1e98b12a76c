"""What a query's attention takes over keys and values of each format, beside Q4_0 in the same run.

As a cache holds them (formats of blocks in token tiles, f16 in rows), and in rows, as plain arrays
have them. "over q4_0" compares with Q4_0 of the same kind, taking turns with it; a second q4_0 says
how far equal things are apart. Bits are those of a value.

    python bench/formats.py [--kv 4096] [--isa avx2] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import mixedkv as mkv
import numpy as np
import turns

FORMATS = ("q4_0", "q8_0", "iq4_nl", "nl4", "nl3", "f16")


def in_rows(x: Any, kind: str) -> Any:
    """Return rows of a format as the op takes them."""
    return x.astype(np.float16) if kind == "f16" else mkv.quantize(x, kind)


def calls(heads: tuple[int, int, int], kv: int) -> dict[str, Callable[[], object]]:
    """Return a decode step of every format, from the cache and from rows."""
    hq, hkv, dim = heads
    rng = np.random.default_rng(1)
    q = rng.standard_normal((hq, 1, dim), dtype=np.float32)
    k, v = rng.standard_normal((2, hkv, kv, dim), dtype=np.float32)
    result: dict[str, Callable[[], object]] = {}
    for name in (*FORMATS, "q4_0 again"):
        kind = name.split()[0]
        cache = mkv.MixedKVCache(
            num_layers=1, num_kv_heads=hkv, head_dim=dim, quantize=False,
            hot_size=-(-kv // 32) * 32, hot_k_type=kind, hot_v_type=kind,
        )  # fmt: skip
        cache.append(range(kv - 1), [0] * (kv - 1), [k[:, :-1]], [v[:, :-1]])
        assert cache.find_slot([kv - 1], [0])
        cache.store(0, k[:, -1:], v[:, -1:])
        out = np.empty_like(q)
        result[f"cache {name}"] = partial(cache.attend, 0, q, out=out)
        rows = [in_rows(x[None], kind) for x in (k, v)]
        out = np.empty_like(q[None])
        result[f"rows {name}"] = partial(mkv.attention, q[None], *rows, out=out)
    return result


def report(heads: tuple[int, int, int], args: argparse.Namespace) -> None:
    """Print the table of one shape."""
    times = turns.Times(calls(heads, args.kv), args)
    print(turns.title(heads, args))
    print(f"{'':12} {'bits':>5} {'cache us':>9} {'over q4_0':>9} {'rows us':>9} {'over q4_0':>9}")
    for name in (*FORMATS, "q4_0 again"):
        info = mkv.formats.info(name.split()[0])
        line = f"{name:12} {8 * info.block_bytes / info.block_values:5.2f}"
        for where in ("cache", "rows"):
            line += f" {times.best(f'{where} {name}'):9.1f}"
            line += f" {times.ratio(f'{where} {name}', f'{where} q4_0'):9.3f}"
        print(line)


def main() -> None:
    """Print a table for each shape: the least of all turns' medians, and ratios."""
    args = turns.parse(turns.parser(__doc__))
    for heads in turns.SHAPES:
        report(heads, args)


if __name__ == "__main__":
    main()
