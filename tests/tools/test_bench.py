"""`mixedkv bench`: its shapes, data, turns and contenders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref

pytest.importorskip("typer")
pytest.importorskip("rich")

from bench_cases import ODD, TINY
from bench_cases import peer as peer
from mixedkv.tools.bench import plan, problem, shapes, timing
from mixedkv.tools.bench.peers import Peer, load, own, rival

# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("llama-3.1-8b", (32, 8, 128)),
        ("Qwen3-8B", (32, 8, 128)),
        ("qwen3-0.6b", (16, 8, 128)),
        ("smollm2-135m", (9, 3, 64)),
        ("mha", (32, 32, 128)),
        ("gemma-2b", (8, 1, 256)),
        ("12,4,96", (12, 4, 96)),
        ("(12, 4, 96)", (12, 4, 96)),
    ],
)
def test_shape_by_name_or_numbers(text: str, sizes: tuple[int, int, int]) -> None:
    assert shapes.parse_shape(text).sizes == sizes


@pytest.mark.parametrize("text", ["llama", "1,2", "1,2,3,4", "3,2,64", "4,2,65", "0,0,64", "a,b,c"])
def test_shape_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|got"):
        shapes.parse_shape(text)


# --- data and the right answer -------------------------------------------------------------------


def test_problem_q4_0_is_the_format(rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, 96), np.float32)
    x[0, :32] = 0
    x[1, 3], x[1, 9] = -2.5, 2.5
    rows = problem.quantize_q4_0(x)
    np.testing.assert_array_equal(rows, ref.quantize_q4_0(x))
    np.testing.assert_array_equal(rows, mkv.quantize_q4_0(x))
    np.testing.assert_array_equal(problem.dequantize_q4_0(rows), ref.dequantize_q4_0(rows))


@pytest.mark.parametrize("name", mkv.formats.available())
def test_problem_rows_are_the_format(name: str, rng: np.random.Generator) -> None:
    """What judges a format has its bytes and its values."""
    x = rng.standard_normal((5, 7, 128), np.float32).astype(np.float16)
    rows = problem.rows_in(x, name)
    assert rows.nbytes == x.size * mkv.formats.info(name).bits / 8
    if name in mkv.formats.packed():
        np.testing.assert_array_equal(rows, ref.PACKED[name][0](x.astype(np.float32)))
    np.testing.assert_array_equal(problem.values_of(rows, name), ref.stored_as(x, name))


def test_problem_kinds_are_of_packed_formats() -> None:
    assert problem.kinds(["f16", "q4_0"]) == ["f32->q4_0", "f16->q4_0", "q4_0->f32", "q4_0->f16"]
    every = problem.kinds(mkv.formats.available())
    assert len(every) == len(set(every)) == 4 * len(mkv.formats.packed())


@pytest.mark.parametrize(
    ("kv_type", "formats", "found"),
    [
        ("f32", ("f16", "q4_0"), "f16"),
        ("f32", ("q4_0", "bf16", "f32"), "f32"),
        ("bf16", ("f16", "bf16"), "bf16"),
        ("u8", ("f16", "q4_0"), "q4_0"),
        ("int8", ("q4_0", "q8_0"), "q8_0"),
        ("u4", ("q8_0", "q4_0"), "q4_0"),
        ("int4", ("f16", "f32"), None),
        ("f16", ("q8_0",), None),
    ],
)
def test_rival_is_the_nearest_of_its_kind(
    kv_type: str, formats: tuple[str, ...], found: str | None
) -> None:
    assert rival(kv_type, formats) == found


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 1), (1, 37), (5, 5), (5, 37)])
def test_problem_answer_is_attention(qo_len: int, kv_len: int) -> None:
    one = problem.Problem.random(ODD, qo_len, kv_len)
    want, _ = ref.attention(one.q, one.k, one.v, causal=True, q_start=kv_len - qo_len, kv_start=0)
    np.testing.assert_allclose(
        one.answer_in("f16"), want.reshape(one.q.shape), rtol=1e-12, atol=1e-12
    )


def test_problem_answer_hot_and_cold() -> None:
    one = problem.Problem.random(ODD, 1, 40)
    k, v = (problem.dequantize_q4_0(problem.quantize_q4_0(x)) for x in (one.k, one.v))
    k[:, 30:], v[:, 30:] = one.k[:, 30:], one.v[:, 30:]
    want, _ = ref.attention(one.q, k, v)
    np.testing.assert_allclose(
        one.answer_in("q4_0", hot=10), want.reshape(one.q.shape), rtol=1e-12, atol=1e-12
    )


def test_relative_error_of_nan_is_infinite() -> None:
    assert problem.relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) == np.inf


def test_aligned_empty_begins_on_a_cache_line() -> None:
    for shape in ((1,), (3, 5), (1, 1000)):
        assert problem.aligned_empty(shape, np.float16).ctypes.data % 64 == 0


# --- turns ---------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only the contenders and sleeping move on."""

    def __init__(self) -> None:
        self.now = 0.0
        #: CPU seconds that other threads burn in each second of sleep.
        self.busy_until = 0.0
        self.cpu = 0.0
        self.calls: list[str] = []

    def clock(self) -> timing.Clock:
        return timing.Clock(now=lambda: self.now, cpu=lambda: self.cpu, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        if self.now < self.busy_until:
            self.cpu += seconds
        self.now += seconds

    def run(self, name: str, seconds: Callable[[float], float]) -> timing.Run:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds(self.now)

        return timing.Run(name, call)


def test_measure_interleaves_and_begins_each_round_elsewhere() -> None:
    fake = FakeTime()
    runs = [fake.run(name, lambda now: 1.0) for name in "abc"]
    timings = timing.measure(runs, rounds=4, clock=fake.clock())
    # One call each to see how long it takes; calls this long are not warmed up.
    assert "".join(fake.calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(one.rounds) for one in timings] == [4, 4, 4]
    assert [one.calls for one in timings] == [1, 1, 1]


def test_measure_calls_short_ones_more_often() -> None:
    fake = FakeTime()
    runs = [fake.run("a", lambda now: 1e-3), fake.run("b", lambda now: 1.0)]
    a, b = timing.measure(runs, rounds=2, clock=fake.clock())
    assert (a.calls, b.calls) == (10, 1)
    assert a.median == pytest.approx(1e-3)
    assert b.best == pytest.approx(1.0)


def test_measure_ratio_survives_drift() -> None:
    fake = FakeTime()
    # The machine gets slower and slower: medians drift apart from bests, the ratio does not.
    runs = [
        fake.run("a", lambda now: 1.0 * (1 + int(now / 100))),
        fake.run("b", lambda now: 3.0 * (1 + int(now / 100))),
    ]
    a, b = timing.measure(runs, rounds=99, clock=fake.clock())
    assert a.median > 2 * a.best
    assert timing.median_ratio(b, a) == pytest.approx(3.0)


def test_measure_stops_by_time_but_not_before_the_least() -> None:
    fake = FakeTime()
    (one,) = timing.measure([fake.run("a", lambda now: 1.0)], seconds=5.0, clock=fake.clock())
    assert 5 <= len(one.rounds) <= 6
    (one,) = timing.measure([fake.run("a", lambda now: 9.0)], seconds=5.0, clock=fake.clock())
    assert len(one.rounds) == 3


def test_measure_of_what_times_itself() -> None:
    fake = FakeTime()
    seconds = iter([0.5, 0.25, 0.75])
    run = timing.Run("reader", lambda: next(seconds), self_timed=True)
    (one,) = timing.measure([run], rounds=3, clock=fake.clock())
    assert (one.best, one.median) == (0.25, 0.5)


def test_measure_nothing() -> None:
    assert timing.measure([], rounds=3, clock=FakeTime().clock()) == []


def test_settle_waits_for_spinning_threads_but_not_forever() -> None:
    fake = FakeTime()
    fake.busy_until = 10e-3
    timing.settle(fake.clock())
    assert 10e-3 <= fake.now < 12e-3
    fake = FakeTime()
    fake.busy_until = 1e9
    timing.settle(fake.clock())
    assert fake.now < 2 * timing.SETTLE_SECONDS


# --- contenders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [shapes.DEFAULT_FORMATS, None], ids=["default", "all"])
@pytest.mark.parametrize("task", ["decode", "prefill"])
@pytest.mark.parametrize("shape", [TINY, ODD, shapes.Shape("one", 2, 1, 128)], ids=str)
def test_contenders_are_right(
    peer: Peer, shape: shapes.Shape, task: Any, formats: Sequence[str] | None
) -> None:
    """Each on the keys and values that it holds, by float64, on one thread and two."""
    lengths = ((1, 33), (1, 70)) if task == "decode" else ((40, 40), (40, 70))
    formats = plan.formats_of(shape, formats or mkv.formats.available())
    for qo_len, kv_len in lengths:
        data = problem.Problem.random(shape, qo_len, kv_len)
        contenders = peer.attention(task, data, formats)
        assert {one.against for one in contenders} <= set(formats)
        assert len({one.name for one in contenders}) == len(contenders)
        for contender in contenders:
            for threads in (1, 2):
                call = contender.bind(threads)
                call()
                call()
                result = contender.result()
                assert result.shape == data.q.shape
                error = problem.relative_error(result, contender.answer())
                assert error <= contender.tolerance, contender.name
            assert contender.kv_bytes > 0


def test_contenders_would_notice_a_lost_key(peer: Peer) -> None:
    """The bound is below what one hidden key in a hundred makes."""
    data = problem.Problem.random(TINY, 1, 100)
    without = data.keys(0, 99)
    for contender in peer.attention("decode", data):
        lost = problem.relative_error(without.answer_in("f16"), data.answer_in("f16"))
        assert contender.tolerance < lost, contender.name


def test_conversions_are_the_format(peer: Peer) -> None:
    """Of every format, for those who have it; the answer is no timed kernel's."""
    rows = problem.Rows(50, 64, mkv.formats.available())
    for conversion in peer.conversions(rows):
        for threads in (1, 2):
            conversion.bind(threads)()
            want = rows.answer(conversion.kind)
            differing = conversion.result().reshape(want.shape) != want
            assert np.mean(differing) <= conversion.tolerance, conversion.kind
            assert conversion.tolerance == 0 or peer.name == "ggml"


def test_own_tiers_hold_what_they_are_named_for() -> None:
    data = problem.Problem.random(TINY, 1, 2000)
    stats = own.two_tiers(data, "q4_0", 1).stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (0, 1999)  # the query's own is pending
    stats = own.two_tiers(data, "q4_0", 1024).stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (1023, 976)
    stats = own.one_tier(data, "f16").stats()
    assert (stats.hot_tokens, stats.cold_tokens) == (1999, 0)


def test_load_names_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peers, absent = load(["mixedkv", "ggml"], ggml_dir=tmp_path)
    assert [one.name for one in peers] == ["mixedkv"]
    assert str(tmp_path) in absent["ggml"]
    assert "--build-ggml" in absent["ggml"]
    monkeypatch.setitem(sys.modules, "torch", None)
    peers, absent = load(["torch"])
    assert not peers
    assert "pip install torch" in absent["torch"]


def test_package_is_lazy() -> None:
    code = (
        "import sys, mixedkv.tools.bench, mixedkv.tools.bench.peers, mixedkv.tools.bench.plan\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'matplotlib', 'rich', 'typer', 'gguf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
