"""Presets: whole configurations by name, for one sequence or several, and changed by options."""

import math
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from mixedkv.cache import presets

GEOMETRY = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 64}
BITS = {"near_lossless": 8.5, "balanced": 4.5, "small": 4.25, "tiny": 3.5}
"""Of a value without its share of a center: 16 bits a dim for 128 keys, and none for values."""


@pytest.mark.parametrize("name", presets.NAMES)
def test_preset(name: str) -> None:
    cache = mkv.MixedKVCache.preset(name, **GEOMETRY, cold_size=4096)
    config = cache.config
    assert (config.rotate, config.center_keys, config.sink_tokens, config.hot_keep) == (
        True,
        True,
        4,
        128,
    )
    assert config == presets.config(name, **GEOMETRY, cold_size=4096)
    values = 2 * 3 * 2 * 64  # layers, kv heads, K and V, head_dim
    bits = 8 * cache.stats().cold_bytes / (4096 * values)
    assert BITS[name] + 0.06 < bits < BITS[name] + 0.07


def test_presets_go_from_large_to_small() -> None:
    assert presets.NAMES == ("near_lossless", "balanced", "small", "tiny")
    sizes = [
        mkv.MixedKVCache.preset(name, **GEOMETRY, cold_size=4096).stats().total_bytes
        for name in presets.NAMES
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_balanced_holds_ggml_bytes() -> None:
    config = presets.config("balanced", **GEOMETRY)
    assert {config.cold_k_type, config.cold_v_type} <= {"q4_0", "iq4_nl"}
    assert config.fit_scales


def test_balanced_takes_little_at_4000_tokens() -> None:
    """All bytes, of a model like SmolLM2-135M, against the same tokens in f16."""
    shape = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
    options = presets.options("balanced")
    level = math.floor(options["threshold"] * options["hot_size"])  # what hot may end with
    cold_size = -(-(4000 - level) // 32) * 32
    stats = mkv.MixedKVCache.preset("balanced", **shape, cold_size=cold_size).stats()
    assert stats.total_bytes <= 0.38 * 4000 * 30 * 3 * 2 * 64 * 2


def test_options_change_a_preset() -> None:
    cache = mkv.MixedKVCache.preset(
        "small", **GEOMETRY, cold_size=512, hot_size=512, hot_keep=64, cold_v_type="q8_0"
    )
    assert (cache.config.hot_size, cache.config.hot_keep) == (512, 64)
    assert (cache.config.cold_k_type, cache.config.cold_v_type) == ("nl4", "q8_0")


def test_sizes_are_for_each_sequence() -> None:
    one = presets.config("balanced", **GEOMETRY)
    three = presets.config("balanced", **GEOMETRY, n_seq_max=3)
    assert three.hot_size == 3 * one.hot_size
    assert three.group_size == 3 * one.group_size
    assert presets.config("balanced", **GEOMETRY, n_seq_max=3, hot_size=640).hot_size == 640
    mkv.MixedKVCache(three)  # pins of all sequences have room


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"hot_size": 64}, (64, 16, 31, 4)),
        ({"hot_size": 16}, (16, 4, 7, 1)),
        ({"hot_size": 1}, (1, 1, 0, 0)),
        ({"hot_size": 1024}, (1024, 64, 128, 4)),
        ({"threshold": 0.5}, (320, 64, 80, 4)),
        ({"n_pad": 48}, (336, 64, 128, 4)),
        ({"sink_tokens": 300}, (320, 64, 15, 300)),
        ({"hot_keep": 314}, (320, 64, 314, 1)),
        ({"hot_size": 64, "group_size": 40, "hot_keep": 3}, (64, 40, 3, 4)),
        ({"n_seq_max": 4, "hot_size": 256}, (256, 64, 31, 4)),
    ],
)
def test_a_presets_sizes_fit_those_given(
    given: dict[str, Any], wanted: tuple[int, int, int, int]
) -> None:
    """hot_size, group_size, hot_keep and sink_tokens."""
    if "n_pad" not in given:
        given = {**given, "n_pad": 1}
    config = presets.config("balanced", **GEOMETRY, cold_size=96, **given)
    assert (config.hot_size, config.group_size, config.hot_keep, config.sink_tokens) == wanted


@pytest.mark.parametrize(
    ("window", "given", "wanted"),
    [
        (128, {}, (320, 128)),
        (512, {}, (704, 512)),
        (1000, {}, (1216, 1000)),
        (1024, {"sink_tokens": 0}, (1216, 1024)),
        (1025, {}, (320, 128)),
        (512, {"hot_size": 320}, (320, 158)),
        (512, {"hot_keep": 64}, (704, 64)),
    ],
)
def test_hot_holds_a_models_sliding_window(
    window: int, given: dict[str, int], wanted: tuple[int, int]
) -> None:
    options = presets.options("balanced", window=window, **given)
    assert (options["hot_size"], options["hot_keep"]) == wanted
    mkv.CacheConfig(**GEOMETRY, **options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hot_size": "many"}, "hot_size"),
        ({"hot_size": -3}, "hot_size.*-3"),
        ({"n_pad": 0}, "n_pad.*0"),
        ({"threshold": float("nan")}, "threshold.*nan"),
        ({"threshold": None, "hot_size": 64}, "threshold"),
        ({"hot_keep": 316}, "hot_keep.*316"),
        ({"n_seq_max": 0}, "n_seq_max.*0"),
        ({"n_seq_max": 1.5}, "n_seq_max.*1.5"),
    ],
)
def test_what_can_not_be_beside_a_preset(given: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        presets.config("balanced", **GEOMETRY, cold_size=96, **given)


def test_a_preset_decodes() -> None:
    """The newest 128 positions and the first four stay hot, at every step."""
    random = np.random.default_rng(0)
    cache = mkv.MixedKVCache.preset(
        "balanced", num_layers=1, num_kv_heads=1, head_dim=64, cold_size=512
    )
    for position in range(500):
        assert cache.find_slot(pos=[position], seq_id=[0]) is not None
        rows = random.standard_normal((2, 1, 1, 64)).astype(np.float32)
        cache.store(0, rows[0], rows[1])
        cache.commit()
        if position % 37 == 0:
            held = set(cache.positions(0)[~cache.tiers(0)].tolist())
            assert held >= set(range(min(4, position + 1)))
            assert held >= set(range(max(0, position - 127), position + 1))
    assert cache.stats().cold_tokens >= 500 - 316  # the level above which tokens move


def test_wrong_presets() -> None:
    words = "preset must be one of near_lossless, balanced, small, tiny, got 'huge'"
    with pytest.raises(ValueError, match=words):
        mkv.MixedKVCache.preset("huge", **GEOMETRY)
    with pytest.raises(TypeError, match="MixedKVCache has no option 'hot'"):
        mkv.MixedKVCache.preset("tiny", hot=3, **GEOMETRY)
