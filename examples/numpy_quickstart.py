"""mixedkv from numpy: Q4_0 rows, attention with a carried state, and the mixed cache."""

import mixedkv as mkv
import numpy as np

rng = np.random.default_rng(42)
num_qo_heads, num_kv_heads, head_dim, kv_len = 8, 2, 64, 1000


def normal(heads: int, count: int) -> np.ndarray:
    return rng.standard_normal((heads, count, head_dim), dtype=np.float32)


# --- attention over keys and values of any mix of types ----------------------------------------
q = normal(num_qo_heads, 1)
k = normal(num_kv_heads, kv_len)
v = normal(num_kv_heads, kv_len)
whole = mkv.attention(q, k.astype(np.float16), v.astype(np.float16))
print("one call:", whole.shape)

# The same keys and values in two segments: 900 old ones in Q4_0, 100 new ones in f16. The state
# carries what the softmax needs to go on from one segment to the next.
state = mkv.AttentionState(num_qo_heads=num_qo_heads, qo_len=1, head_dim=head_dim)
state.update(q, mkv.quantize_q4_0(k[:, :900]), mkv.quantize_q4_0(v[:, :900]))
state.update(q, k[:, 900:].astype(np.float16), v[:, 900:].astype(np.float16))
mixed = state.finalize()
error = np.linalg.norm(mixed - whole) / np.linalg.norm(whole)
print(f"two segments, one of them in 4.5 bits: {error:.3f} relative difference")

# Segments attended elsewhere (other threads, other machines) merge into the state of the whole.
parts = []
for segment in (slice(0, 300), slice(300, 1000)):
    part = mkv.AttentionState(num_qo_heads=num_qo_heads, qo_len=1, head_dim=head_dim)
    part.update(q, k[:, segment], v[:, segment])
    parts.append(part)
merged = mkv.merge(parts).finalize()
exact = mkv.attention(q, k, v)
print(f"merged from two parts: {np.abs(merged - exact).max():.1e} largest difference")

# --- a cache that moves old tokens to Q4_0 by itself --------------------------------------------
cache = mkv.MixedKVCache(
    num_layers=2,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    hot_size=128,
    cold_size=1024,
    group_size=32,
    sink_tokens=4,
)


def step(first: int, count: int) -> None:
    """Take `count` new tokens through both layers, as a model would."""
    slot = cache.find_slot(pos=range(first, first + count), seq_id=[0] * count)
    if slot is None:
        raise mkv.CacheFull("no room")
    for layer in range(2):
        cache.store(layer, normal(num_kv_heads, count), normal(num_kv_heads, count))
        cache.attend(layer, normal(num_qo_heads, count))
    cache.commit()


step(0, 500)  # a prompt longer than the hot tier
for position in range(500, 600):
    step(position, 1)
stats = cache.stats()
print(f"{len(cache)} tokens: {stats.hot_tokens} hot, {stats.cold_tokens} cold")
print(f"{stats.total_bytes:,} bytes in all, {stats.bytes_saved:,} saved in the cold tier")
