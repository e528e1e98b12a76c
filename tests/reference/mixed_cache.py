"""The mixed cache as plain lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .attention import attention
from .formats import stored_as

HOT, COLD = "hot", "cold"
MAX_POS = 2**31 - 1


class NoRoomError(Exception):
    """What the library says with CacheFull."""


@dataclass
class Token:
    """A cell in use. Rows are float32 [Hkv, D], as what they are stored as gives them back."""

    pos: int
    owners: set[int]
    age: int = -1  # place in the order of commits; -1 while pending
    tier: str = HOT
    k: dict[int, np.ndarray] = field(default_factory=dict)
    v: dict[int, np.ndarray] = field(default_factory=dict)

    def copied(self) -> Token:
        return Token(self.pos, set(self.owners), self.age, self.tier, dict(self.k), dict(self.v))


@dataclass
class Plan:
    """The pending ubatch, what find_slot says of it, and what restore needs."""

    tokens: list[Token]
    bound_for_cold: list[Token]
    num_moved: int
    undo: tuple[list[Token], int, int]
    stored: set[int] = field(default_factory=set)
    k: dict[int, np.ndarray] = field(default_factory=dict)
    v: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def num_hot(self) -> int:
        return len(self.tokens) - len(self.bound_for_cold)

    @property
    def num_cold(self) -> int:
        return len(self.bound_for_cold)


class MixedCacheModel:
    """The mixed cache by brute force: one list of tokens, searched anew for every question.

    What it says of a token: its position, its owners, its age, its tier, its rows. What it does
    not know: cells, bytes, threads.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        hot_size: int,
        cold_size: int,
        group_size: int,
        threshold: float = 0.8,
        n_seq_max: int = 1,
        hot_k_type: str = "f16",
        hot_v_type: str = "f16",
        cold_k_type: str = "q4_0",
        cold_v_type: str = "q4_0",
        sink_tokens: int = 0,
        hot_keep: int = 0,
        window_left: int = -1,
        quantize: bool = True,
    ) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.hot_size = hot_size
        self.cold_size = cold_size if quantize else 0
        self.group_size = group_size
        self.level = math.floor(threshold * hot_size)
        self.n_seq_max = n_seq_max
        self.types = {HOT: (hot_k_type, hot_v_type), COLD: (cold_k_type, cold_v_type)}
        self.sink_tokens = sink_tokens
        self.hot_keep = hot_keep
        self.displaced_by: list[Token] = []  # new tokens that are the newest in place of others
        self.window_left = window_left
        self.quantize = quantize

        self.tokens: list[Token] = []  # committed
        self.plan: Plan | None = None
        self.next_age = 0
        self.tokens_seen = 0
        self.moved = 0
        self.events = 0

    # --- counting ---------------------------------------------------------------------------------

    def in_tier(self, tier: str) -> list[Token]:
        return [t for t in self.tokens if t.tier == tier]

    def free(self, tier: str) -> int:
        size = self.hot_size if tier == HOT else self.cold_size
        return size - len(self.in_tier(tier))

    def pinned(self, tokens: list[Token]) -> list[bool]:
        """Tell first positions, and the hot_keep highest that one of the owners has in hot."""
        newest: dict[int, set[int]] = {}
        for seq in range(self.n_seq_max) if self.hot_keep else ():
            in_hot = (t for t in (*self.in_tier(HOT), *self.displaced_by) if seq in t.owners)
            newest[seq] = set(sorted({t.pos for t in in_hot})[-self.hot_keep :])
        return [
            t.pos < self.sink_tokens or any(t.pos in newest.get(seq, ()) for seq in t.owners)
            for t in tokens
        ]

    def movable(self) -> list[Token]:
        """Committed hot tokens that are not pinned, oldest first.

        Copies that seq_add or seq_div made are as old as their originals; among those the one
        with the smaller position goes first, then the one whose owners are the smaller number
        when each stands for a bit.
        """
        if not self.quantize:
            return []
        in_hot = self.in_tier(HOT)
        return sorted(
            (t for t, pinned in zip(in_hot, self.pinned(in_hot), strict=True) if not pinned),
            key=lambda t: (t.age, t.pos, sum(1 << s for s in t.owners)),
        )

    # --- moving -----------------------------------------------------------------------------------

    def _cool(self, t: Token) -> None:
        k_type, v_type = self.types[COLD]
        t.k = {layer: stored_as(x, k_type) for layer, x in t.k.items()}
        t.v = {layer: stored_as(x, v_type) for layer, x in t.v.items()}
        t.tier = COLD

    def _move_batch(self) -> int:
        """One event: the oldest min(occupied // 4, group_size), as far as pins and cold let it."""
        movable = self.movable()
        n = max(1, min(len(self.in_tier(HOT)) // 4, self.group_size))
        n = min(n, len(movable), self.free(COLD))
        if n == 0:
            return 0
        for t in movable[:n]:
            self._cool(t)
        self.moved += n
        self.events += 1
        return n

    # --- a ubatch ---------------------------------------------------------------------------------

    def find_slot(self, pos: Sequence[int], seq_id: Sequence[int | Iterable[int]]) -> Plan | None:
        assert self.plan is None
        assert len(pos) > 0
        tokens = [
            Token(p, {s} if isinstance(s, int) else set(s))
            for p, s in zip(pos, seq_id, strict=True)
        ]
        # The newest so far stay. Where there is no other way, those do that will be the newest.
        for self.displaced_by in ([], tokens):
            found = self._find_slot(pos, tokens)
            if found is not None:
                break
        self.displaced_by = []
        return found

    def _find_slot(self, pos: Sequence[int], tokens: list[Token]) -> Plan | None:
        n = len(tokens)
        undo = ([t.copied() for t in self.tokens], self.moved, self.events)

        def plan(bound_for_cold: list[Token], num_moved: int) -> Plan:
            self.plan = Plan(tokens, bound_for_cold, num_moved, undo)
            return self.plan

        if n <= self.free(HOT):
            return plan([], 0)
        if not self.quantize:
            return None
        movable = self.movable()
        if n <= self.free(HOT) + min(len(movable), self.free(COLD)):
            num_moved = 0
            while n > self.free(HOT):
                num_moved += self._move_batch()
            return plan([], num_moved)

        # A long ubatch: hot gives up all it can, keeps pins and the newest up to the level.
        if n > self.free(HOT) + self.free(COLD):
            return None
        order = sorted(range(n), key=lambda i: (pos[i], i))
        by_age = [tokens[i] for i in order]
        before, self.displaced_by = self.displaced_by, tokens
        is_pinned = self.pinned(by_age)
        self.displaced_by = before
        pins = [t for t, pinned in zip(by_age, is_pinned, strict=True) if pinned]
        others = [t for t, pinned in zip(by_age, is_pinned, strict=True) if not pinned]
        held = len(self.in_tier(HOT)) - len(movable)
        room_in_cold = self.free(COLD) - len(movable)
        stay = max(self.level - held, len(pins), n - room_in_cold)
        if held + stay > self.hot_size:
            return None
        for t in movable:
            self._cool(t)
        self.moved += len(movable)
        self.events += -(-len(movable) // self.group_size)
        return plan(others[: n - stay], len(movable))

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """k [Hkv, n, D], v [Hkv, n, Dv]: rows of the slot's tokens, in the order of find_slot."""
        assert self.plan is not None
        k_type, v_type = self.types[HOT]
        self.plan.stored.add(layer)
        self.plan.k[layer] = stored_as(k, k_type)
        self.plan.v[layer] = stored_as(v, v_type)

    def visible(self, i: int, window_left: int | None = None) -> list[tuple[Token, int]]:
        """What token i of the slot sees: (token, its index in the slot, or -1 if committed)."""
        assert self.plan is not None
        window = self.window_left if window_left is None else window_left
        query = self.plan.tokens[i]
        seq = min(query.owners)
        everyone = [(t, -1) for t in self.tokens]
        everyone += [(t, j) for j, t in enumerate(self.plan.tokens)]
        return [
            (t, j)
            for t, j in everyone
            if seq in t.owners
            and t.pos <= query.pos
            and (window < 0 or t.pos >= query.pos - window)
        ]

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        *,
        window_left: int | None = None,
        alibi_slopes: np.ndarray | None = None,
        sinks: np.ndarray | None = None,
        only: Sequence[int] | None = None,
        **options: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """q [Hq, n, D] -> out [Hq, n, Dv], lse [Hq, n]; only: those of the slot's tokens, the
        others are left NaN (this is slow)."""
        assert self.plan is not None
        assert layer in self.plan.stored
        num_qo_heads, n, _ = q.shape
        out = np.full((num_qo_heads, n, self.head_dim_v), np.nan)
        lse = np.full((num_qo_heads, n), np.nan)
        for i in range(n) if only is None else only:
            query = self.plan.tokens[i]
            seen = self.visible(i, window_left)
            k = np.stack([t.k[layer] if j < 0 else self.plan.k[layer][:, j] for t, j in seen], 1)
            v = np.stack([t.v[layer] if j < 0 else self.plan.v[layer][:, j] for t, j in seen], 1)
            # ALiBi's distances, as a mask of one row a query head.
            bias = None
            if alibi_slopes is not None:
                distance = np.array([t.pos - query.pos for t, _ in seen], np.float64)
                bias = np.broadcast_to(distance, (1, num_qo_heads, 1, len(seen)))
            o, s = attention(
                q[:, i : i + 1], k, v, mask=bias, alibi_slopes=alibi_slopes, sinks=sinks, **options
            )
            out[:, i], lse[:, i] = o[0, :, 0], s[0, :, 0]
        return out, lse

    def commit(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        order = sorted(range(len(plan.tokens)), key=lambda i: (plan.tokens[i].pos, i))
        for i in order:
            t = plan.tokens[i]
            t.age = self.next_age
            self.next_age += 1
            for layer in range(self.num_layers):
                if layer in plan.stored:
                    t.k[layer], t.v[layer] = plan.k[layer][:, i], plan.v[layer][:, i]
                else:  # a layer that was not stored holds zeros
                    t.k[layer] = np.zeros((self.num_kv_heads, self.head_dim), np.float32)
                    t.v[layer] = np.zeros((self.num_kv_heads, self.head_dim_v), np.float32)
            self.tokens.append(t)
        self.tokens_seen += len(plan.tokens)
        for t in plan.bound_for_cold:
            self._cool(t)
        self.moved += plan.num_cold
        self.events += -(-plan.num_cold // self.group_size)
        while len(self.in_tier(HOT)) > self.level and self._move_batch():
            pass

    def restore(self) -> None:
        assert self.plan is not None
        self.tokens, self.moved, self.events = self.plan.undo
        self.plan = None

    # --- sequences --------------------------------------------------------------------------------

    def _owned(self, seq: int, p0: int = -1, p1: int = -1) -> list[Token]:
        return [
            t
            for t in self.tokens
            if seq in t.owners and (p0 < 0 or t.pos >= p0) and (p1 < 0 or t.pos < p1)
        ]

    def _drop_unowned(self) -> None:
        self.tokens = [t for t in self.tokens if t.owners]

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> None:
        for s in range(self.n_seq_max) if seq < 0 else [seq]:
            for t in self._owned(s, p0, p1):
                t.owners.discard(s)
        self._drop_unowned()

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        for t in self._owned(src, p0, p1):
            t.owners.add(dst)

    def seq_keep(self, seq: int) -> None:
        for t in self.tokens:
            t.owners &= {seq}
        self._drop_unowned()

    def _shift(self, seq: int, p0: int, p1: int, new_pos: Callable[[int], int]) -> None:
        """Moves positions of seq alone: a token that others own too is copied first."""
        changed = [t for t in self._owned(seq, p0, p1) if new_pos(t.pos) != t.pos]
        copies = [t for t in changed if len(t.owners) > 1 and new_pos(t.pos) >= 0]
        freed = [t for t in changed if len(t.owners) == 1 and new_pos(t.pos) < 0]
        for tier in (HOT, COLD):
            room = self.free(tier) + sum(t.tier == tier for t in freed)
            if sum(t.tier == tier for t in copies) > room:
                raise NoRoomError(tier)
        for t in changed:
            moved = t.copied()
            moved.owners, moved.pos = {seq}, new_pos(t.pos)
            t.owners.discard(seq)
            if moved.pos >= 0:
                self.tokens.append(moved)
        self._drop_unowned()

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        if any(t.pos + delta > MAX_POS for t in self._owned(seq, p0, p1)):
            raise OverflowError(delta)
        self._shift(seq, p0, p1, lambda p: p + delta)

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        self._shift(seq, p0, p1, lambda p: p // d)

    def seq_gather(self, sources: Sequence[int]) -> None:
        for t in self.tokens:
            t.owners = {i for i, s in enumerate(sources) if s in t.owners}
        self._drop_unowned()

    def seq_pos_min(self, seq: int) -> int:
        return min((t.pos for t in self._owned(seq)), default=-1)

    def seq_pos_max(self, seq: int) -> int:
        return max((t.pos for t in self._owned(seq)), default=-1)

    def clear(self) -> None:
        if self.plan is not None:
            self.restore()
        self.tokens = []

    # --- looking ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.tokens)

    def in_order(self, seq: int) -> list[Token]:
        """Tokens of seq by position, older ones first where two share one."""
        return sorted(self._owned(seq), key=lambda t: (t.pos, t.age))

    def positions(self, seq: int) -> list[int]:
        return [t.pos for t in self.in_order(seq)]

    def tiers(self, seq: int) -> list[bool]:
        return [t.tier == COLD for t in self.in_order(seq)]

    def keys(self, layer: int, seq: int) -> np.ndarray:
        rows = [t.k[layer] for t in self.in_order(seq)]
        return np.stack(rows, 1) if rows else np.zeros((self.num_kv_heads, 0, self.head_dim))

    def values(self, layer: int, seq: int) -> np.ndarray:
        rows = [t.v[layer] for t in self.in_order(seq)]
        return np.stack(rows, 1) if rows else np.zeros((self.num_kv_heads, 0, self.head_dim_v))
