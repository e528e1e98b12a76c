"""MixedKVCache against the brute-force model of reference, driven by random operations."""

from __future__ import annotations

import os
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest

pytest.importorskip("hypothesis")

import reference as ref
from conftest import assert_close, assert_lse_close, tolerance
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

LAYERS, HQ, HKV, D, DV = 2, 4, 2, 32, 64
# (hot, cold, group, n_pad)
GRID = [(8, 32, 4, 4), (16, 64, 8, 8), (32, 128, 16, 8), (64, 256, 32, 16)]
TYPES = [
    ("f16", "f16", "q4_0", "q4_0"),
    ("f32", "f32", "q4_0", "q4_0"),
    ("f32", "f16", "f16", "q4_0"),
    ("f16", "q4_0", "q4_0", "q4_0"),
]
# Attention of a long ubatch is compared at this many of its tokens: the model is slow.
MOST_QUERIES = 6


class CacheMachine(RuleBasedStateMachine):
    """Every rule does the same to both; every invariant asks both the same."""

    cache: Any = None
    shrunk = False  # some newest tokens went, or older ones came in beside them

    @initialize(
        kind=st.sampled_from(["mixed"] * 6 + ["mixed without cold", "unified"]),
        grid=st.sampled_from(GRID),
        types=st.sampled_from(TYPES),
        n_seq_max=st.integers(1, 3),
        sink_tokens=st.integers(0, 1),
        hot_keep=st.one_of(st.just(0), st.integers(1, 12)),
        threshold=st.sampled_from([0.8, 0.8, 0.5, 1.0]),
        window_left=st.sampled_from([-1, -1, -1, 0, 5]),
    )
    def create(
        self,
        kind: str,
        grid: tuple[int, ...],
        types: tuple[str, ...],
        n_seq_max: int,
        sink_tokens: int,
        hot_keep: int,
        threshold: float,
        window_left: int,
    ) -> None:
        hot, cold, group, n_pad = grid
        if sink_tokens * n_seq_max >= int(threshold * hot):
            sink_tokens = 0
        # As many as the pins of all sequences together leave below the level.
        hot_keep = max(min(hot_keep, (int(threshold * hot) - 1) // n_seq_max - sink_tokens), 0)
        shape: dict[str, Any] = {
            "num_layers": LAYERS,
            "num_kv_heads": HKV,
            "head_dim": D,
            "head_dim_v": DV,
            "n_seq_max": n_seq_max,
            "window_left": window_left,
        }
        mixed: dict[str, Any] = {
            "hot_size": hot,
            "cold_size": cold,
            "group_size": group,
            "threshold": threshold,
            "hot_k_type": types[0],
            "hot_v_type": types[1],
            "cold_k_type": types[2],
            "cold_v_type": types[3],
            "sink_tokens": sink_tokens,
            "hot_keep": hot_keep,
            "quantize": kind == "mixed",
        }
        if kind == "unified":
            self.cache = mkv.UnifiedKVCache(
                **shape, size=hot, n_pad=n_pad, k_type=types[0], v_type=types[1]
            )
        else:
            self.cache = mkv.MixedKVCache(**shape, **mixed, n_pad=n_pad)
        self.model = ref.MixedCacheModel(**shape, **mixed)
        self.kinds = types if kind == "mixed" else types[:2]
        self.n_seq_max = n_seq_max
        self.next_layer = 0

    # --- ubatches ---------------------------------------------------------------------------------

    @rule(data=st.data())
    def prompt(self, data: st.DataObject) -> None:
        """The next tokens of one sequence, anything from one to more than there is room for."""
        room = self.model.hot_size + self.model.cold_size
        sizes = st.one_of(
            st.integers(1, 3), st.integers(1, self.model.hot_size), st.integers(1, room + 2)
        )
        n = data.draw(sizes, "n")
        seq = self.any_seq(data)
        first = self.model.seq_pos_max(seq) + 1
        self.ubatch(data.draw, list(range(first, first + n)), [seq] * n)

    @rule(data=st.data(), steps=st.integers(1, 12))
    def decode(self, data: st.DataObject, steps: int) -> None:
        """One token a sequence, several times."""
        some = st.sets(st.integers(0, self.n_seq_max - 1), min_size=1)
        seqs = sorted(data.draw(some, "seqs"))
        for _ in range(steps):
            self.ubatch(data.draw, [self.model.seq_pos_max(s) + 1 for s in seqs], list(seqs))

    @rule(data=st.data())
    def anything(self, data: st.DataObject) -> None:
        """Tokens at random positions, of random and of several owners, in random order."""
        draw = data.draw
        n = draw(st.integers(1, self.model.hot_size + 4), "n")
        rng = np.random.default_rng(draw(st.integers(0, 2**32), "seed"))
        owners: list[Any] = [int(s) for s in rng.integers(0, self.n_seq_max, n)]
        if draw(st.booleans(), "sets"):
            owners = [
                {s, int(rng.integers(self.n_seq_max))} if rng.random() < 0.5 else s for s in owners
            ]
        spread = draw(st.sampled_from([3, 3 * self.model.hot_size, 2**31]), "spread")
        self.ubatch(draw, [int(p) for p in rng.integers(0, spread, n)], owners)

    def ubatch(self, draw: Any, pos: list[int], owners: list[Any]) -> None:
        n = len(pos)
        slot = self.cache.find_slot(pos=pos, seq_id=owners)
        plan = self.model.find_slot(pos, owners)
        if plan is None:
            assert slot is None
            return
        assert slot is not None, "the model found room"
        assert (slot.num_tokens, slot.num_hot, slot.num_cold, slot.num_moved) == (
            n,
            plan.num_hot,
            plan.num_cold,
            plan.num_moved,
        )
        rng = np.random.default_rng(draw(st.integers(0, 2**32), "rows"))
        layers = [i for i in range(LAYERS) if rng.random() < 0.95]
        dtypes = draw(st.sampled_from([(np.float32, np.float32), (np.float16, np.float32)]))
        for layer in layers:
            for _ in range(1 + (rng.random() < 0.1)):  # the last store of a layer wins
                k = rng.standard_normal((HKV, n, D)).astype(dtypes[0])
                v = rng.standard_normal((HKV, n, DV)).astype(dtypes[1])
                self.cache.store(layer, k, v)
                self.model.store(layer, k, v)
            self.attend(draw, rng, layer, n)
        self.books_agree()
        if draw(st.integers(0, 3), "end") == 0:
            self.cache.restore()
            self.model.restore()
        else:
            self.cache.commit()
            self.model.commit()

    def attend(self, draw: Any, rng: np.random.Generator, layer: int, n: int) -> None:
        options: dict[str, Any] = {}
        if draw(st.integers(0, 3), "options") == 0:
            options = {
                "sm_scale": 0.3,
                "logits_soft_cap": draw(st.sampled_from([0.0, 3.0])),
                "window_left": draw(st.sampled_from([None, -1, 0, 3, 40])),
                "alibi_slopes": draw(
                    st.sampled_from([None, np.array([0.5, 0.1, 0.02, 0.0], np.float32)])
                ),
                "sinks": draw(st.sampled_from([None, np.array([0, 1, -1, 3], np.float32)])),
            }
        q = rng.standard_normal((HQ, n, D), dtype=np.float32)
        out, lse = self.cache.attend(layer, q, return_lse=True, **options)
        assert np.isfinite(out).all()
        only = range(n)
        if n > MOST_QUERIES:
            only = sorted({0, n - 1, *(int(i) for i in rng.integers(0, n, MOST_QUERIES - 2))})
        want, want_lse = self.model.attend(layer, q, only=only, **options)
        rel = tolerance(*self.kinds)
        assert_close(out[:, only], want[:, only], rel)
        assert_lse_close(lse[:, only], want_lse[:, only], rel)

    # --- sequences --------------------------------------------------------------------------------

    def range_of(self, data: st.DataObject) -> tuple[int, int]:
        highest = max(self.model.seq_pos_max(s) for s in range(self.n_seq_max)) + 2
        edge = st.integers(-1, min(highest, 400) + 1)
        return data.draw(edge, "p0"), data.draw(edge, "p1")

    def any_seq(self, data: st.DataObject, lowest: int = 0) -> int:
        return int(data.draw(st.integers(lowest, self.n_seq_max - 1), "seq"))

    @rule(data=st.data())
    def seq_rm(self, data: st.DataObject) -> None:
        args = self.any_seq(data, -1), *self.range_of(data)
        self.cache.seq_rm(*args)
        self.model.seq_rm(*args)
        self.shrunk = True

    @precondition(lambda self: self.n_seq_max > 1)
    @rule(data=st.data())
    def seq_cp(self, data: st.DataObject) -> None:
        args = self.any_seq(data), self.any_seq(data), *self.range_of(data)
        self.cache.seq_cp(*args)
        self.model.seq_cp(*args)
        self.shrunk = True

    @precondition(lambda self: self.n_seq_max > 1)
    @rule(data=st.data())
    def seq_cp_whole(self, data: st.DataObject) -> None:
        args = self.any_seq(data), self.any_seq(data)
        self.cache.seq_cp(*args)
        self.model.seq_cp(*args)
        self.shrunk = True

    @precondition(lambda self: self.n_seq_max > 1 and len(self.model) > 0)
    @rule(data=st.data())
    def seq_keep(self, data: st.DataObject) -> None:
        seq = self.any_seq(data)
        self.cache.seq_keep(seq)
        self.model.seq_keep(seq)

    @rule(data=st.data(), delta=st.integers(-20, 20))
    def seq_add(self, data: st.DataObject, delta: int) -> None:
        self.shift("seq_add", self.any_seq(data), *self.range_of(data), delta)

    @rule(data=st.data(), d=st.integers(1, 4))
    def seq_div(self, data: st.DataObject, d: int) -> None:
        self.shift("seq_div", self.any_seq(data), *self.range_of(data), d)

    def shift(self, op: str, *args: int) -> None:
        self.shrunk = True
        try:
            getattr(self.model, op)(*args)
        except ref.NoRoomError:
            with pytest.raises(mkv.CacheFull):
                getattr(self.cache, op)(*args)
        except OverflowError:
            with pytest.raises(ValueError, match="delta"):
                getattr(self.cache, op)(*args)
        else:
            getattr(self.cache, op)(*args)

    @precondition(lambda self: self.n_seq_max > 1)
    @rule(data=st.data())
    def seq_gather(self, data: st.DataObject) -> None:
        some = st.lists(st.integers(0, self.n_seq_max - 1), min_size=1, max_size=self.n_seq_max)
        sources = data.draw(some, "sources")
        self.cache.seq_gather(sources)
        self.model.seq_gather(sources)

    @rule(really=st.integers(0, 5))
    def clear(self, really: int) -> None:
        if really == 0:
            self.cache.clear()
            self.model.clear()
            self.shrunk = False

    # --- agreement --------------------------------------------------------------------------------

    def books_agree(self) -> None:
        model, cache = self.model, self.cache
        assert len(cache) == len(model)
        stats = cache.stats()
        assert (stats.hot_tokens, stats.cold_tokens) == (
            len(model.in_tier(ref.HOT)),
            len(model.in_tier(ref.COLD)),
        )
        assert (stats.moved, stats.events, stats.tokens_seen) == (
            model.moved,
            model.events,
            model.tokens_seen,
        )
        assert stats.hot_tokens <= stats.hot_size
        assert stats.cold_tokens <= stats.cold_size
        for seq in range(self.n_seq_max):
            assert list(cache.positions(seq)) == model.positions(seq)
            assert cache.seq_pos_min(seq) == model.seq_pos_min(seq)
            assert cache.seq_pos_max(seq) == model.seq_pos_max(seq)

    @invariant()
    def books(self) -> None:
        if self.cache is not None:
            self.books_agree()
            assert self.cache.stats().scratch_bytes == 0

    @invariant()
    def no_newest_token_is_cold_beside_a_hot_one(self) -> None:
        """Said apart from the model: unless sequences shrank, the newest are in hot."""
        if self.cache is None or self.model.hot_keep == 0 or self.shrunk:
            return
        for seq in range(self.n_seq_max):
            assert not self.cache.tiers(seq)[-self.model.hot_keep :].any()

    @invariant()
    def tiers_and_rows(self) -> None:
        """One layer a step, in turn; copies of one token at one position are compared as a set."""
        if self.cache is None:
            return
        self.next_layer = layer = (self.next_layer + 1) % LAYERS
        for seq in range(self.n_seq_max):
            tokens = self.model.in_order(seq)
            groups = [(t.pos, t.age) for t in tokens]
            got = rows(
                groups,
                self.cache.tiers(seq),
                self.cache.keys(layer, seq),
                self.cache.values(layer, seq),
            )
            want = rows(
                groups,
                self.model.tiers(seq),
                self.model.keys(layer, seq),
                self.model.values(layer, seq),
            )
            for g, w in zip(got, want, strict=True):
                assert g[:2] == w[:2], f"tier of position {g[0][0]}: cold {g[1]}, model {w[1]}"
                np.testing.assert_array_equal(g[2], w[2])
                np.testing.assert_array_equal(g[3], w[3])


def rows(
    groups: list[tuple[int, int]], cold: Any, k: np.ndarray, v: np.ndarray
) -> list[tuple[tuple[int, int], bool, np.ndarray, np.ndarray]]:
    assert k.shape == (HKV, len(groups), D)
    assert v.shape == (HKV, len(groups), DV)
    found = [(g, bool(cold[i]), k[:, i], v[:, i]) for i, g in enumerate(groups)]
    return sorted(found, key=lambda r: (*r[:2], r[2].tobytes()))


def test_cache_machine() -> None:
    deep = os.environ.get("MIXEDKV_HYPOTHESIS_PROFILE") == "deep"
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=3000 if deep else 150, stateful_step_count=60 if deep else 25
        ),
    )
