"""Python threads, the GIL, and fork. Nothing here measures time; it waits for things to happen."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal

# Long enough that another thread surely gets a turn while a call runs.
BIG = (1, 8, 8, 256, 4096, 64, 64)
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """The interpreter hands the GIL over often, so that a race has its chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def big(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, Hq, Hkv, Lq, Lkv, D, Dv = BIG
    q = normal(rng, B, Hq, Lq, D)
    return q, normal(rng, B, Hkv, Lkv, D), normal(rng, B, Hkv, Lkv, Dv)


def run_all(*targets: Callable[[], Any]) -> list[BaseException]:
    """Runs them at once, each in a thread of its own; returns what they raised."""
    start, raised = threading.Barrier(len(targets)), []

    def body(target: Callable[[], Any]) -> None:
        start.wait(PATIENCE)
        try:
            target()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=body, args=(t,), daemon=True) for t in targets]
    for t in threads:
        t.start()
    for t in threads:
        t.join(PATIENCE)
        assert not t.is_alive(), "a call hangs"
    return raised


# --- the GIL --------------------------------------------------------------------------------------


def progress_during(call: Callable[[], Any]) -> int:
    """How many turns another Python thread gets between begin and end of one call.

    Counted between two stamps that the calling thread takes itself; with the switch interval of
    this module a thread gets at most a few turns by switches before and after the call.
    """
    turns, stop = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1

    other = threading.Thread(target=count, daemon=True)
    other.start()
    before = turns
    call()
    after = turns
    stop.set()
    other.join(PATIENCE)
    return after - before


def test_threads_attention_releases_the_gil(rng: np.random.Generator) -> None:
    q, k, v = big(rng)
    assert progress_during(lambda: mkv.attention(q, k, v, threads=1)) > 10_000


def test_threads_state_update_releases_the_gil(rng: np.random.Generator) -> None:
    q, k, v = big(rng)
    state = mkv.AttentionState(num_qo_heads=BIG[1], qo_len=BIG[3], head_dim=BIG[6], batch=1)
    assert progress_during(lambda: state.update(q, k, v, threads=1)) > 10_000


def test_threads_quantize_releases_the_gil(rng: np.random.Generator) -> None:
    x = normal(rng, 1 << 18, 128)
    assert progress_during(lambda: mkv.quantize_q4_0(x, threads=1)) > 10_000


def test_threads_cache_attend_releases_the_gil(rng: np.random.Generator) -> None:
    cache = filled(rng, n=4096, pending=1024)
    q = normal(rng, 8, 1024, 64)
    assert progress_during(lambda: cache.attend(0, q, threads=1)) > 10_000


# --- calls side by side ---------------------------------------------------------------------------


def test_threads_concurrent_attention_gives_the_same_bits(rng: np.random.Generator) -> None:
    """Callers that share the worker pool, with different shapes, options and thread counts."""
    cases = []
    for i in range(4):
        q = normal(rng, 1, 4, 3 + 20 * i, 32)
        k, v = normal(rng, 1, 2, 500 + 700 * i, 32), normal(rng, 1, 2, 500 + 700 * i, 64)
        options = {"causal": bool(i % 2), "threads": 1 + i}
        cases.append((q, k, v, options, mkv.attention(q, k, v, **options)))

    def work(i: int) -> Callable[[], None]:
        def body() -> None:
            for j in range(12):
                q, k, v, options, want = cases[(i + j) % len(cases)]
                np.testing.assert_array_equal(mkv.attention(q, k, v, **options), want)

        return body

    assert run_all(*(work(i) for i in range(5))) == []


def test_threads_concurrent_quantize_gives_the_same_bits(rng: np.random.Generator) -> None:
    x = normal(rng, 4096, 128)
    want = mkv.quantize_q4_0(x)

    def body() -> None:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(mkv.quantize_q4_0(x, threads=threads), want)

    assert run_all(*[body] * 4) == []


def test_threads_caches_of_their_own_do_not_meet(rng: np.random.Generator) -> None:
    k = normal(rng, 2, 300, 64)
    q = normal(rng, 4, 1, 64)

    def life() -> np.ndarray:
        cache = small()
        cache.append(range(300), [0] * 300, [k], [k])
        outs = []
        for p in range(300, 330):
            cache.find_slot(pos=[p], seq_id=[0])
            cache.store(0, k[:, p - 300 : p - 299], k[:, :1])
            outs.append(cache.attend(0, q))
            cache.commit()
        return np.stack(outs)

    want = life()

    def body() -> None:
        np.testing.assert_array_equal(life(), want)

    assert run_all(*[body] * 4) == []


def test_threads_select_isa_meanwhile_is_safe(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 4, 3, 64), normal(rng, 2, 700, 64), normal(rng, 2, 700, 64)
    before = mkv.isa.active()
    want = {}
    for name in mkv.isa.available():
        mkv.isa.select(name)
        want[name] = mkv.attention(q, k, v)

    def switch() -> None:
        for _ in range(30):
            for name in mkv.isa.available():
                mkv.isa.select(name)

    def work() -> None:
        for _ in range(60):
            out = mkv.attention(q, k, v)
            assert all(np.allclose(out, w, atol=1e-5) for w in want.values())

    try:
        assert run_all(switch, work, work) == []
    finally:
        mkv.isa.select(before)


# --- one cache, one state -------------------------------------------------------------------------


def small(**options: Any) -> mkv.MixedKVCache:
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64}
    sizes = {"hot_size": 64, "cold_size": 512, "group_size": 16}
    return mkv.MixedKVCache(**{**shape, **sizes, **options})


def filled(rng: np.random.Generator, n: int, pending: int) -> mkv.MixedKVCache:
    """n committed tokens and a stored slot."""
    cache = small(num_kv_heads=8, hot_size=n + 2 * pending, cold_size=n)
    k = normal(rng, 8, n, 64)
    cache.append(range(n), [0] * n, [k], [k])
    cache.find_slot(pos=range(n, n + pending), seq_id=[0] * pending)
    cache.store(0, k[:, :pending], k[:, :pending])
    return cache


def collide(busy: Callable[[], Any], meanwhile: Callable[[], Any]) -> list[BaseException]:
    """Calls `meanwhile` again and again in another thread until it was refused while `busy` ran;
    returns what it raised, and fails where `busy` itself was disturbed."""
    raised: list[BaseException] = []
    done = threading.Event()

    def other() -> None:
        while not done.is_set() and not raised:
            try:
                meanwhile()
            except RuntimeError as error:
                raised.append(error)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        for _ in range(200):
            try:
                busy()
            except RuntimeError as error:  # the other one was in first
                raised.append(error)
            if raised:
                break
    finally:
        done.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    return raised


MEANWHILE: dict[str, Callable[[mkv.MixedKVCache], Any]] = {
    "attend": lambda c: c.attend(0, np.zeros((8, 512, 64), np.float32)),
    "store": lambda c: c.store(
        0, np.zeros((8, 512, 64), np.float32), np.zeros((8, 512, 64), np.float32)
    ),
    "stats": lambda c: c.stats(),
    "len": len,
    "keys": lambda c: c.keys(0, 0),
    "positions": lambda c: c.positions(0),
    "seq_pos_max": lambda c: c.seq_pos_max(0),
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_threads_second_thread_in_a_cache_is_refused(rng: np.random.Generator, name: str) -> None:
    cache = filled(rng, n=2048, pending=512)
    q = normal(rng, 8, 512, 64)
    raised = collide(lambda: cache.attend(0, q), lambda: MEANWHILE[name](cache))
    assert raised, "no call was ever refused"
    assert type(raised[0]) is RuntimeError
    assert "in use by another thread" in str(raised[0])
    cache.commit()
    assert len(cache) == 2048 + 512


def test_threads_mutation_while_attending_is_refused_and_changes_nothing(
    rng: np.random.Generator,
) -> None:
    cache = filled(rng, n=2048, pending=512)
    q = normal(rng, 8, 512, 64)
    want = cache.attend(0, q)

    def meanwhile() -> None:
        # A ValueError (a slot is pending) where it comes in between: just as harmless.
        with contextlib.suppress(ValueError):
            cache.seq_rm(0)

    raised = collide(lambda: np.testing.assert_array_equal(cache.attend(0, q), want), meanwhile)
    assert raised
    assert "in use by another thread" in str(raised[0])
    np.testing.assert_array_equal(cache.attend(0, q), want)


def test_threads_many_in_one_cache_never_crash(rng: np.random.Generator) -> None:
    """Whatever they do, each call works, or says that the order is wrong or the cache in use."""
    cache = small(n_seq_max=2)
    k = normal(rng, 2, 40, 64)
    calls: list[Callable[[], Any]] = [
        lambda: cache.find_slot(pos=range(5), seq_id=[0] * 5),
        lambda: cache.store(0, k[:, :5], k[:, :5]),
        lambda: cache.attend(0, np.ones((4, 5, 64), np.float32)),
        cache.commit,
        cache.restore,
        lambda: cache.append(range(40), [1] * 40, [k], [k]),
        lambda: cache.seq_rm(0),
        lambda: cache.seq_cp(0, 1),
        lambda: cache.seq_add(1, 0, -1, 3),
        lambda: cache.keys(0, 1),
        cache.stats,
        cache.clear,
    ]

    def work(seed: int) -> Callable[[], None]:
        def body() -> None:
            turn = np.random.default_rng(seed)
            for i in turn.integers(0, len(calls), 600):
                try:
                    calls[i]()
                except (ValueError, mkv.CacheFull):
                    pass
                except RuntimeError as error:
                    if "in use by another thread" not in str(error):
                        raise

        return body

    assert run_all(*(work(seed) for seed in range(4))) == []
    cache.clear()
    cache.append(range(40), [0] * 40, [k], [k])
    assert len(cache) == 40


def test_threads_second_thread_in_a_state_is_refused(rng: np.random.Generator) -> None:
    q, k, v = big(rng)
    state = mkv.AttentionState(num_qo_heads=BIG[1], qo_len=BIG[3], head_dim=BIG[6], batch=1)
    raised = collide(lambda: state.update(q, k, v), state.finalize)
    assert raised
    assert "in use by another thread" in str(raised[0])
    state.reset()
    state.update(q, k, v)
    np.testing.assert_array_equal(state.finalize(), mkv.attention(q, k, v))


def test_threads_cache_goes_from_thread_to_thread(rng: np.random.Generator) -> None:
    """One after the other is fine."""
    cache = small()
    k = normal(rng, 2, 30, 64)
    for i in range(4):
        raised = run_all(lambda i=i: cache.append(range(30 * i, 30 * i + 30), [0] * 30, [k], [k]))
        assert raised == []
    assert len(cache) == 120


# --- fork -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_child_of_a_fork_computes_the_same(rng: np.random.Generator) -> None:
    """The pool's workers don't live on in a child; its calls must not wait for them."""
    code = """
import os, sys
import numpy as np
import mixedkv as m
rng = np.random.default_rng(1)
q, k = rng.standard_normal((8, 40, 64), np.float32), rng.standard_normal((8, 3000, 64), np.float32)
cache = m.MixedKVCache(num_layers=1, num_kv_heads=8, head_dim=64, hot_size=1024, cold_size=4096)
cache.append(range(2000), [0] * 2000, [k[:, :2000]], [k[:, :2000]])
def work():
    cache.find_slot(pos=range(2000, 2040), seq_id=[0] * 40)
    cache.store(0, k[:, :40], k[:, :40])
    out = cache.attend(0, q, threads=4)
    cache.restore()
    return m.attention(q, k, k, threads=4), out, m.quantize_q4_0(k, threads=4)
want = work()
child = os.fork()
same = all(np.array_equal(a, b) for a, b in zip(work(), want))
if child == 0:
    grandchild = os.fork()
    same = same and all(np.array_equal(a, b) for a, b in zip(work(), want))
    if grandchild:
        same = same and os.waitpid(grandchild, 0)[1] == 0
    os._exit(0 if same else 3)
status = os.waitpid(child, 0)[1]
sys.exit(0 if same and status == 0 else 4)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], start_new_session=True)
    try:
        assert process.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a child of fork hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_fork_while_another_thread_computes() -> None:
    """The pool may be busy, its lock held, in the moment of the fork."""
    code = """
import os, sys, threading
import numpy as np
import mixedkv as m
rng = np.random.default_rng(1)
q, k = rng.standard_normal((8, 16, 64), np.float32), rng.standard_normal((8, 2000, 64), np.float32)
want = m.attention(q, k, k, threads=3)
stop = threading.Event()
def busy():
    while not stop.is_set():
        m.attention(q, k, k, threads=3)
thread = threading.Thread(target=busy)
thread.start()
bad = 0
for _ in range(15):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(m.attention(q, k, k, threads=3), want) else 3)
    bad += os.waitpid(child, 0)[1] != 0
stop.set()
thread.join()
sys.exit(bad)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], start_new_session=True)
    try:
        assert process.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a child of fork hangs")


def test_threads_interpreter_ends_while_a_daemon_thread_computes() -> None:
    code = """
import threading, numpy as np, mixedkv as m
k = np.ones((8, 20000, 64), np.float32)
q = np.ones((8, 64, 64), np.float32)
def busy():
    while True:
        m.attention(q, k, k, threads=3)
threading.Thread(target=busy, daemon=True).start()
m.attention(q[:, :1], k, k)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=PATIENCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_threads_arguments_that_change_during_a_call_do_no_harm() -> None:
    """Positions and owners are copied before they are checked."""
    n = 20_000
    cache = mkv.UnifiedKVCache(num_layers=1, num_kv_heads=1, head_dim=1, size=n, n_pad=1)
    pos, seq = np.arange(n), np.zeros(n, np.int64)
    done = threading.Event()

    def meddle() -> None:
        while not done.is_set():
            seq[-1] = 2**31 - 1
            pos[-1] = -1
            seq[-1] = 0
            pos[-1] = n - 1

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        for _ in range(100):
            try:
                slot = cache.find_slot(pos=pos, seq_id=seq)
            except ValueError as error:
                assert re.search(r"seq_id|pos", str(error))  # noqa: PT017
            else:
                assert slot is not None
                assert slot.num_tokens == n
                cache.restore()
    finally:
        done.set()
        meddler.join()
    seq[-1], pos[-1] = 0, n - 1
    assert cache.find_slot(pos=pos, seq_id=seq) is not None
    cache.commit()
    np.testing.assert_array_equal(cache.positions(0), np.arange(n))
