"""Times attention of two installed versions of mixedkv in turns, and prints the ratios.

    python bench/two_versions.py BEFORE AFTER [--rounds 9] [--threads 2] [--only REGEX]

BEFORE and AFTER are directories to put first on PYTHONPATH (each with a built mixedkv in it). Each
round starts both anew, in an order that alternates; a figure is the median over the rounds of each
round's median. Decode (one query) and prefill (512 causal queries) over f16 and Q4_0 tiers of a
cache, and over rows; only options that both versions have are used. --only times the cases in whose
names, as printed, the regular expression is found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = ((32, 8, 128), (9, 3, 64))
KEYS = (512, 4096, 32768)


def best_of(call: Callable[[], Any], seconds: float) -> float:
    """Give the median time of a call, over so many seconds."""
    for _ in range(3):
        call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(threads: int, seconds: float, only: str) -> dict[str, float]:
    """Give times in seconds, by case, of the version that this interpreter finds."""
    import mixedkv as mkv
    import numpy as np

    mkv.set_num_threads(threads)
    rng = np.random.default_rng(1)
    results: dict[str, float] = {}

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    def wanted(case: str) -> bool:
        return re.search(only, case) is not None

    for hq, hkv, d in SHAPES:
        for n in KEYS:
            k, v = normal(hkv, n, d).astype(np.float16), normal(hkv, n, d).astype(np.float16)
            for kind in ("f16", "q4_0"):
                where = f"({hq},{hkv},{d}) kv {n} {kind}"
                queries = {"decode": 1} if n > 4096 else {"decode": 1, "prefill": 512}
                queries = {w: count for w, count in queries.items() if wanted(f"{w} {where}")}
                if not queries:
                    continue
                cache = mkv.MixedKVCache(
                    num_layers=1, num_kv_heads=hkv, head_dim=d, quantize=False,
                    hot_size=n + 512, hot_k_type=kind, hot_v_type=kind,
                )  # fmt: skip
                cache.append(range(n), [0] * n, [k], [v])
                for what, count in queries.items():
                    q = normal(hq, count, d)
                    out = np.empty_like(q)
                    cache.find_slot(range(n, n + count), [0] * count)
                    new = normal(hkv, count, d)
                    cache.store(0, new, new)
                    results[f"{what} {where}"] = best_of(
                        lambda c=cache, q=q, out=out: c.attend(0, q, out=out), seconds
                    )
                    cache.restore()
            case = f"decode ({hq},{hkv},{d}) kv {n} q4_0 rows"
            if wanted(case):
                rows = [mkv.quantize_q4_0(k)[None], mkv.quantize_q4_0(v)[None]]
                q = normal(1, hq, 1, d)
                results[case] = best_of(lambda q=q, rows=rows: mkv.attention(q, *rows), seconds)
    return results


def run(path: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the version under path, in a process of its own."""
    command = [sys.executable, __file__, path, path, "--child"]
    command += ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    command += ["--only", arguments.only]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def main() -> None:
    """Run both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.threads, arguments.seconds, arguments.only)))
        return
    both: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(arguments.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            both[which].append(run((arguments.before, arguments.after)[which], arguments))
    print(f"{'case':44} {'before us':>10} {'after us':>10} {'ratio':>7}")
    for case in both[0][0]:
        before, after = (statistics.median(r[case] for r in runs) for runs in both)
        print(f"{case:44} {before * 1e6:10.1f} {after * 1e6:10.1f} {after / before:7.3f}")


if __name__ == "__main__":
    main()
