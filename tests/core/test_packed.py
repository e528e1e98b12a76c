"""Q4_0 rows in caches, many tokens to a tile: the cells of different sequences share bytes, and
freed ones keep stale bits. None of that may show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import (
    Q4_0_REL,
    assert_close,
    assert_lse_close,
    normal,
    relative_error,
    tolerance,
)

HQ, HKV = 4, 2
HEAD_DIMS = [(32, 96), (96, 32), (128, 128)]
TYPES = [("q4_0", "q4_0"), ("q4_0", "f16"), ("f16", "q4_0"), ("q4_0", "f32"), ("f32", "q4_0")]


def ids(value: Any) -> str:
    return "_".join(map(str, value))


class Twin:
    """A cache of one layer, and what each of its sequences should hold."""

    def __init__(self, cache: Any, types: tuple[str, str], head_dims: tuple[int, int]) -> None:
        self.cache = cache
        self.types = types
        self.head_dims = head_dims
        self.rows: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, rng: np.random.Generator, pos: Sequence[int], seqs: Sequence[int]) -> None:
        """One ubatch, attended before it is committed."""
        dk, dv = self.head_dims
        n = len(pos)
        k, v, q = normal(rng, HKV, n, dk), normal(rng, HKV, n, dv), normal(rng, HQ, n, dk)
        # Scales of tokens that share a tile differ widely.
        v *= np.exp2(rng.integers(-4, 3, (1, n, 1))).astype(np.float32)
        assert self.cache.find_slot(pos=list(pos), seq_id=list(seqs)) is not None
        self.cache.store(0, k, v)
        for i, (p, s) in enumerate(zip(pos, seqs, strict=True)):
            self.rows.setdefault(s, {})[p] = (
                ref.stored_as(k[:, i], self.types[0]),
                ref.stored_as(v[:, i], self.types[1]),
            )
        out, lse = self.cache.attend(0, q, return_lse=True)
        self.cache.commit()
        for i, (p, s) in enumerate(zip(pos, seqs, strict=True)):
            want, want_lse = self.expected(q[:, i : i + 1], p, s)
            assert_close(out[:, i : i + 1], want, tolerance(*self.types))
            assert_lse_close(lse[:, i : i + 1], want_lse, tolerance(*self.types))

    def expected(self, q: np.ndarray, p: int, s: int) -> tuple[np.ndarray, np.ndarray]:
        seen = [at for at in sorted(self.rows[s]) if at <= p]
        k = np.stack([self.rows[s][at][0] for at in seen], 1)
        v = np.stack([self.rows[s][at][1] for at in seen], 1)
        out, lse = ref.attention(q, k, v)
        return out[0], lse[0]

    def remove(self, s: int, p0: int, p1: int) -> None:
        self.cache.seq_rm(s, p0, p1)
        self.rows[s] = {p: row for p, row in self.rows[s].items() if not p0 <= p < p1}

    def check_rows(self) -> None:
        for s, rows in self.rows.items():
            assert list(self.cache.positions(s)) == sorted(rows)
            if not rows:
                continue
            k = np.stack([rows[p][0] for p in sorted(rows)], 1)
            v = np.stack([rows[p][1] for p in sorted(rows)], 1)
            np.testing.assert_array_equal(self.cache.keys(0, s), k)
            np.testing.assert_array_equal(self.cache.values(0, s), v)


def unified(
    types: tuple[str, str], head_dims: tuple[int, int], size: int = 640, seqs: int = 4
) -> Twin:
    cache = mkv.UnifiedKVCache(
        num_layers=1, num_kv_heads=HKV, head_dim=head_dims[0], head_dim_v=head_dims[1],
        size=size, n_seq_max=seqs, n_pad=1, k_type=types[0], v_type=types[1],
    )  # fmt: skip
    return Twin(cache, types, head_dims)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=ids)
@pytest.mark.parametrize("types", TYPES, ids=ids)
def test_packed_interleaved_sequences_with_holes(
    isa: str, rng: np.random.Generator, types: tuple[str, str], head_dims: tuple[int, int]
) -> None:
    """Tokens of four sequences lie side by side; holes of all sizes are torn and filled again."""
    twin = unified(types, head_dims)
    ends = [0, 0, 0, 0]

    def grow(n: int) -> None:
        seqs = [int(s) for s in rng.integers(0, 4, n)]
        pos = []
        for s in seqs:
            pos.append(ends[s])
            ends[s] += 1
        twin.add(rng, pos, seqs)

    for n in (1, 15, 16, 37, 1, 70, 5):
        grow(n)
    for _ in range(4):
        for _ in range(6):
            s = int(rng.integers(0, 4))
            p0 = int(rng.integers(0, ends[s]))
            twin.remove(s, p0, p0 + int(rng.integers(1, 12)))
        for n in (1, 1, 9, 40, 3):
            grow(n)
        twin.check_rows()


def test_packed_long_prefill_then_decode(isa: str, rng: np.random.Generator) -> None:
    """Many query rows over many keys, then one at a time, from a cell within a tile on."""
    twin = unified(("q4_0", "q4_0"), (32, 96), size=700, seqs=2)
    twin.add(rng, [0, 1, 2], [1, 1, 1])
    twin.add(rng, range(300), [0] * 300)
    for p in range(300, 305):
        twin.add(rng, [p], [0])
    twin.add(rng, range(305, 345), [0] * 40)
    twin.check_rows()


@pytest.mark.parametrize("types", TYPES, ids=ids)
def test_packed_stale_bits_do_not_show(
    isa: str, rng: np.random.Generator, types: tuple[str, str]
) -> None:
    """NaN and huge rows of neighbours, dead or alive: the same bits as without them."""
    dk, dv = 96, 32
    n = 24
    k, v = normal(rng, HKV, n, dk), normal(rng, HKV, n, dv)
    q = normal(rng, HQ, 1, dk)
    results = []
    for bad in (0.0, 1.0, 65504.0, np.nan, np.inf):
        cache = mkv.UnifiedKVCache(
            num_layers=1, num_kv_heads=HKV, head_dim=dk, head_dim_v=dv, size=64, n_seq_max=3,
            n_pad=1, k_type=types[0], v_type=types[1],
        )  # fmt: skip

        def fill(cache: Any, seq: int, count: int, value: float) -> None:
            rows = np.full((HKV, count, 1), value, np.float32)
            cache.append(
                list(range(count)), [seq] * count,
                [np.broadcast_to(rows, (HKV, count, dk)).copy()],
                [np.broadcast_to(rows, (HKV, count, dv)).copy()],
            )  # fmt: skip

        fill(cache, 1, 64, bad)  # every cell has held such a row
        cache.seq_rm(1, 0, 20)
        cache.seq_rm(1, 27, 30)
        cache.seq_rm(1, 33, 40)  # sequence 1 lives on in the cells between
        cache.append(list(range(n)), [0] * n, [k], [v])
        assert cache.find_slot(pos=[n], seq_id=[0]) is not None
        cache.store(0, np.ones((HKV, 1, dk), np.float32), np.ones((HKV, 1, dv), np.float32))
        out, lse = cache.attend(0, q, return_lse=True)
        assert np.isfinite(out).all()
        results.append((out.tobytes(), lse.tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=ids)
@pytest.mark.parametrize("cold", [("q4_0", "q4_0"), ("q4_0", "f16"), ("f16", "q4_0")], ids=ids)
@pytest.mark.parametrize("hot", [("f16", "f16"), ("q4_0", "f16"), ("q4_0", "q4_0")], ids=ids)
def test_packed_mixed_cache_equals_model(
    isa: str,
    rng: np.random.Generator,
    head_dims: tuple[int, int],
    cold: tuple[str, str],
    hot: tuple[str, str],
) -> None:
    shape: dict[str, Any] = {
        "num_layers": 1, "num_kv_heads": HKV, "head_dim": head_dims[0], "head_dim_v": head_dims[1],
        "hot_size": 40, "cold_size": 300, "group_size": 7, "n_seq_max": 3,
        "hot_k_type": hot[0], "hot_v_type": hot[1], "cold_k_type": cold[0], "cold_v_type": cold[1],
    }  # fmt: skip
    cache = mkv.MixedKVCache(**shape, n_pad=1)
    model = ref.MixedCacheModel(**shape)
    ends = [0, 0, 0]

    def step(n: int) -> None:
        seqs = [int(s) for s in rng.integers(0, 3, n)]
        pos = []
        for s in seqs:
            pos.append(ends[s])
            ends[s] += 1
        k, v = normal(rng, HKV, n, head_dims[0]), normal(rng, HKV, n, head_dims[1])
        q = normal(rng, HQ, n, head_dims[0])
        assert cache.find_slot(pos=pos, seq_id=seqs) is not None
        assert model.find_slot(pos, seqs) is not None
        for it in (cache, model):
            it.store(0, k, v)
        out, lse = cache.attend(0, q, return_lse=True)
        want, want_lse = model.attend(0, q)
        assert_close(out, want, Q4_0_REL)
        assert_lse_close(lse, want_lse, Q4_0_REL)
        cache.commit()
        model.commit()

    for n in (5, 30, 1, 1, 60, 2):
        step(n)
    for _ in range(3):
        for _ in range(4):
            s = int(rng.integers(0, 3))
            p0 = int(rng.integers(0, ends[s]))
            p1 = p0 + int(rng.integers(1, 9))
            cache.seq_rm(s, p0, p1)
            model.seq_rm(s, p0, p1)
        for n in (1, 12, 1, 3):
            step(n)
    for s in range(3):
        assert list(cache.positions(s)) == list(model.positions(s))
        assert list(cache.tiers(s)) == list(model.tiers(s))
        np.testing.assert_array_equal(cache.keys(0, s), model.keys(0, s))
        np.testing.assert_array_equal(cache.values(0, s), model.values(0, s))


@pytest.mark.parametrize("threads", [2, 5])
def test_packed_threads_same_bits(isa: str, rng: np.random.Generator, threads: int) -> None:
    cache = mkv.UnifiedKVCache(
        num_layers=1, num_kv_heads=HKV, head_dim=128, size=3000, n_pad=1, n_seq_max=2,
        k_type="q4_0", v_type="q4_0",
    )  # fmt: skip
    n = 1400
    rows = [normal(rng, HKV, 2 * n, 128) for _ in range(2)]
    cache.append(
        [p // 2 for p in range(2 * n)], [p % 2 for p in range(2 * n)], *[[x] for x in rows]
    )
    q = normal(rng, HQ, 1, 128)
    assert cache.find_slot(pos=[n], seq_id=[1]) is not None
    cache.store(0, rows[0][:, :1], rows[1][:, :1])
    before = mkv.get_num_threads()
    try:
        outs = []
        for count in (1, threads):
            mkv.set_num_threads(count)
            outs.append(cache.attend(0, q).tobytes())
        assert outs[0] == outs[1]
    finally:
        mkv.set_num_threads(before)


def test_packed_bytes_are_those_of_ggml() -> None:
    cache = mkv.UnifiedKVCache(
        num_layers=3, num_kv_heads=HKV, head_dim=96, head_dim_v=32, size=160, n_pad=1,
        k_type="q4_0", v_type="q4_0",
    )  # fmt: skip
    expected = 3 * HKV * 160 * (96 + 32) // 32 * 18
    assert cache.stats().hot_bytes == expected


@pytest.mark.parametrize(("q_channel", "k_channel"), [(3, 70), (70, 3), (5, 5)])
@pytest.mark.parametrize("factor", [30.0, 100.0])
def test_packed_outlier_channels_stay_within_tolerance(
    isa: str, rng: np.random.Generator, q_channel: int, k_channel: int, factor: float
) -> None:
    """A large channel of the query must not round away what large channels of the keys show."""
    n, d = 600, 128
    k, v, q = normal(rng, HKV, n, d), normal(rng, HKV, n, d), normal(rng, HQ, 1, d)
    k[..., k_channel] *= factor
    q[..., q_channel] *= factor
    if q_channel == k_channel:
        q[..., q_channel] /= factor
    cache = mkv.UnifiedKVCache(
        num_layers=1, num_kv_heads=HKV, head_dim=d, size=608, k_type="q4_0", v_type="q4_0"
    )
    cache.find_slot(pos=range(n), seq_id=[0] * n)
    cache.store(0, k, v)
    got = cache.attend(0, np.repeat(q, n, axis=1))[:, -1:]
    cache.commit()
    cache.find_slot(pos=[n], seq_id=[0])
    cache.store(0, k[:, :1], v[:, :1])
    few = cache.attend(0, q)
    cache.commit()
    keys, values = cache.keys(0, 0), cache.values(0, 0)
    want_many, _ = ref.attention(q, keys[:, :n], values[:, :n])
    want_few, _ = ref.attention(q, keys, values)
    assert relative_error(got, want_many[0]) <= Q4_0_REL
    assert relative_error(few, want_few[0]) <= Q4_0_REL


def cold_error(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, k_type: str = "q4_0", v_type: str = "q4_0"
) -> float:
    """Relative error of one query over keys of which all but the newest few are in cold."""
    return cold_error_and_lse(k, v, q, k_type, v_type)[0]


def cold_error_and_lse(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, k_type: str, v_type: str
) -> tuple[float, float]:
    """As cold_error; and the largest |lse|, by which f32 scores themselves are rounded."""
    num_kv_heads, n, d = k.shape
    cache = mkv.MixedKVCache(
        num_layers=1, num_kv_heads=num_kv_heads, head_dim=d, hot_size=48, cold_size=n + 16,
        group_size=16, n_pad=1, cold_k_type=k_type, cold_v_type=v_type,
    )  # fmt: skip
    for begin in range(0, n - 1, 32):
        pos = list(range(begin, min(begin + 32, n - 1)))
        assert cache.find_slot(pos=pos, seq_id=[0] * len(pos)) is not None
        cache.store(0, k[:, pos], v[:, pos])
        cache.commit()
    assert cache.find_slot(pos=[n - 1], seq_id=[0]) is not None
    cache.store(0, k[:, -1:], v[:, -1:])
    got = cache.attend(0, q)
    cache.commit()
    want, lse = ref.attention(q, cache.keys(0, 0), cache.values(0, 0))
    return float(relative_error(got, want[0])), float(np.abs(lse).max())


@pytest.mark.parametrize(("q_channel", "k_channel"), [(3, 9), (3, 70), (9, 9)])
@pytest.mark.parametrize(("of_q", "of_k"), [(100.0, 60.0), (200.0, 60.0), (1e4, 30.0), (1e3, 1e3)])
def test_packed_outlier_channels_of_query_and_keys(
    isa: str, rng: np.random.Generator, q_channel: int, k_channel: int, of_q: float, of_k: float
) -> None:
    """Channels that all queries and all keys share: they shift all scores, and must not hide the
    others, whether in one block or in two."""
    if q_channel == k_channel and of_q * of_k > 2e4:
        pytest.skip("the scores themselves leave f32 too few bits")
    n, d = 600, 128
    k, v, q = normal(rng, HKV, n, d), normal(rng, HKV, n, d), normal(rng, HQ, 1, d)
    q[..., q_channel] = of_q
    k[..., k_channel] = of_k
    assert cold_error(k, v, q) <= Q4_0_REL


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0", "iq4_nl"])
@pytest.mark.parametrize(("q_channel", "k_channel"), [(3, 9), (3, 70)])
@pytest.mark.parametrize("factor", [1e3, 3e3, 1e4])
def test_packed_outliers_in_two_channels_cost_what_f32_scores_do(
    isa: str,
    rng: np.random.Generator,
    fmt: str,
    q_channel: int,
    k_channel: int,
    factor: float,
) -> None:
    """Where all scores share a part so large that f32 rounds the rest away (iq4_nl has no level at
    zero, so that a query's outlier meets one in every key), no arithmetic in f32 does better: rows
    in f32 err as much. Everywhere else the tolerance is that of any input."""
    n, d = 600, 128
    k, v, q = normal(rng, HKV, n, d), normal(rng, HKV, n, d), normal(rng, HQ, 1, d)
    q[..., q_channel] = factor
    k[..., k_channel] = factor
    error, lse = cold_error_and_lse(k, v, q, fmt, fmt)
    assert error <= max(Q4_0_REL, lse * np.finfo(np.float32).eps)


@pytest.mark.parametrize("others", [15, 31, 63, 255])
@pytest.mark.parametrize("values", ["equal", "alternating", "random"])
def test_packed_one_heavy_key_beside_many_light_ones(
    isa: str, rng: np.random.Generator, values: str, others: int
) -> None:
    """Light ones' weights are all rounded the same way; together they count."""
    d, n = 64, others + 34
    k, q = np.zeros((HKV, n, d), np.float32), np.zeros((HQ, 1, d), np.float32)
    q[..., 0] = np.sqrt(d)
    v = np.full((HKV, n, d), 0.1, np.float32)
    if values == "alternating":  # the sign of a block's scale, but not that of its other values
        v[:, ::2, ::32], v[:, 1::2, ::32] = 0.2, -0.2
    if values == "random":
        v[:] = normal(rng, HKV, 1, d)
    heavy = int(rng.integers(0, others))
    v[:, heavy] = 0.0
    v[:, heavy, ::32] = 0.05
    k[:, others + 1 :, 0] = -30.0  # the newest, which are not in cold, count for nothing
    worst = 0.0
    for score in (4.0, 7.0, 9.5, 10.4, 11.0, 12.0, 14.0):
        k[:, heavy, 0] = score
        worst = max(worst, cold_error(k, v, q))
    assert worst <= Q4_0_REL


def test_packed_adversarial_inputs_stay_within_tolerance(
    isa: str, rng: np.random.Generator
) -> None:
    for step in range(60):
        d = int(rng.choice([32, 64, 128]))
        n = int(rng.choice([50, 120, 290, 550]))
        k, v, q = normal(rng, HKV, n, d), normal(rng, HKV, n, d), normal(rng, HQ, 1, d)
        if step % 3 != 0:  # outlier channels that do not decide alone who is seen
            q[..., rng.integers(0, d)] *= 10 ** rng.uniform(0, 4)
            channels = rng.integers(0, d, 2)
            k[..., channels] = 10 ** rng.uniform(0, 4, 2) * np.sign(normal(rng, 2))
        if step % 2:
            heavy = rng.integers(0, n - 34)
            direction = q[:: HQ // HKV, 0] / np.square(q[:: HQ // HKV, 0]).sum(-1, keepdims=True)
            k[:, heavy] += direction * rng.uniform(2, 14) * np.sqrt(d)
        if step % 4 > 1:  # scales of values differ by orders of magnitude
            v *= 10 ** rng.uniform(-4, 4, (1, n, 1)).astype(np.float32)
        if step % 5 == 0:
            v[:] = np.abs(v)
        error = cold_error(k, v, q)
        assert error <= Q4_0_REL, (step, d, n)
