"""What tests of the bench share: shapes, peers, and runs that take no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from mixedkv.tools.bench import plan, problem, shapes
from mixedkv.tools.bench.peers import NAMES, Contender, Peer, load, own

TINY = shapes.Shape("tiny", 4, 2, 64)
ODD = shapes.Shape("odd", 9, 3, 32)


@pytest.fixture(params=NAMES)
def peer(request: pytest.FixtureRequest) -> Peer:
    peers, absent = load([request.param])
    if not peers:
        pytest.skip(absent[request.param])
    return peers[0]


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append(title)

    def at(self, done: float, total: float, what: str = "") -> None:
        assert 0.0 <= done <= total


def small_plan(*tasks: str, **changes: Any) -> plan.Plan:
    fields: dict[str, Any] = {
        "shapes": [TINY],
        "tasks": tasks,
        "formats": shapes.DEFAULT_FORMATS,
        "decode_kv": [40],
        "prefill_kv": [40],
        "threads": [1, 2],
        "seconds": 0.0,
        "rounds": 1,
        "convert_tokens": [4],
        "prefill_queries": 8,
    }
    return plan.Plan(**(fields | changes))


class Stub:
    """A peer that copies mixedkv's contender and changes it."""

    name = "stub"
    version = "1"

    def __init__(self, change: Callable[[Contender], None]) -> None:
        self.notes = ["a note"]
        self._change = change

    def attention(
        self,
        task: Any,
        data: problem.Problem,
        formats: Sequence[str] = shapes.DEFAULT_FORMATS,
    ) -> list[Contender]:
        contender = own.load().attention(task, data, formats)[0]
        contender.peer, contender.name = self.name, "stub"
        self._change(contender)
        return [contender]

    def conversions(self, rows: problem.Rows) -> list[Any]:
        return []


def stub_rows(change: Callable[[Contender], None]) -> tuple[plan.Report, list[plan.Row]]:
    found = plan.run(small_plan("decode"), [own.load(), Stub(change)], {})
    return found, [row for table in found.tables for row in table.rows if row.peer == "stub"]
