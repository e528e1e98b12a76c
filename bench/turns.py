"""Calls timed in turns, for the commands beside this file."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import mixedkv as mkv

#: Query heads, kv heads, head_dim.
SHAPES = [(32, 8, 128), (9, 3, 64)]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads the options that all commands have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--kv", type=int, default=4096, help="keys")
    result.add_argument("--isa", help="an instruction set; default: the one taken by itself")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--turns", type=int, default=40, help="of each")
    result.add_argument("--laps", type=int, default=15, help="calls of a turn")
    return result


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options, and have mixedkv take its instruction set and threads from them."""
    args = options.parse_args()
    if args.isa:
        mkv.isa.select(args.isa)
    mkv.set_num_threads(args.threads)
    return args


def title(heads: tuple[int, int, int], args: argparse.Namespace) -> str:
    """Say what a table is of."""
    return f"{mkv.isa.active()} {heads} kv {args.kv} threads {args.threads}"


class Times:
    """Medians of each call's turns, in seconds."""

    def __init__(self, calls: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> None:
        """Time all calls, turn by turn; every other round goes backwards."""
        self._medians: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for number in range(args.turns):
            for name in names if number % 2 == 0 else reversed(names):
                call, laps = calls[name], []
                call()  # what it reads is near then
                for _ in range(args.laps):
                    begin = time.perf_counter()
                    call()
                    laps.append(time.perf_counter() - begin)
                self._medians[name].append(statistics.median(laps))

    def best(self, name: str) -> float:
        """Return the least of a call's medians, in microseconds."""
        return 1e6 * min(self._medians[name])

    def ratio(self, name: str, base: str) -> float:
        """Return a call's time over another's: the median over rounds, since these have moods."""
        pairs = zip(self._medians[name], self._medians[base], strict=True)
        return statistics.median(mine / other for mine, other in pairs)
