"""Chunks of tokens through a cache, against the same tokens one by one; the simulation beside."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("platformdirs")

import small  # noqa: E402
from mixedkv.cache import presets  # noqa: E402
from mixedkv.tools.eval import configurations, runs, simulate  # noqa: E402
from small import one_thread  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {"llama": small.llama, "gemma3": small.gemma3}
CACHES: dict[str, dict[str, Any]] = {
    "q4_0": {"hot_size": 64},
    "pinned": {"hot_size": 64, "group_size": 8, "sink_tokens": 3},
    "q8_0": {"hot_size": 32, "cold_k_type": "q8_0", "cold_v_type": "iq4_nl"},
    "moves where hot is full": {"hot_size": 64, "threshold": 1.0},
    "moves at every token": {"hot_size": 32, "threshold": 0.5, "group_size": 1},
    "rotated and centered": {
        "hot_size": 64,
        "rotate": True,
        "center_keys": True,
        "cold_k_type": "iq4_nl",
        "cold_v_type": "iq4_nl",
    },
    "a preset's": {**presets.options("balanced"), "hot_size": 96, "hot_keep": 24},
    "little room in cold": {"hot_size": 128, "cold_size": 96},
    "f16": {"hot_size": 256, "quantize": False},
}


def tokens(count: int = 190) -> Any:
    return torch.randint(1, small.VOCABULARY, (count,), generator=torch.Generator().manual_seed(3))


def cache(model: Any, options: dict[str, Any]) -> runs.RealCache:
    return runs.RealCache(model.config, {"cold_size": 256, **options}, record_history=True)


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_chunks_are_what_single_tokens_are(make: Any, options: dict[str, Any]) -> None:
    # One layer, whose keys and values are the same f32 numbers in chunks of any length: else some
    # of them would go to another level of a cold block, which is more than rounding.
    torch.manual_seed(0)
    model, ids = make(num_hidden_layers=1).model, tokens()
    small.sum_in_float64(model)
    single, chunked = cache(model, options), cache(model, options)
    one_by_one = torch.cat([part for _, part in runs.feed(model, ids, single, most=1)])
    parts = [part for _, part in runs.feed(model, ids, chunked, most=48)]
    together = torch.cat(parts)
    assert len(parts) == len(chunked.cache.history)
    if options.get("group_size") != 1:
        assert len(parts) < len(ids) / 3

    # At the end of each chunk both hold the same, and between its ends nothing moved.
    history = {point.tokens_seen: point for point in single.cache.history}
    assert len(history) == len(ids)
    seen = 0
    for point in chunked.cache.history:
        assert point == history[point.tokens_seen]
        inside = range(seen + 1, point.tokens_seen)
        assert {history[step].moved for step in inside} <= {history[seen].moved if seen else 0}
        seen = point.tokens_seen
    assert seen == len(ids)
    for name in ("keys", "values"):
        a, b = (getattr(each.cache.native, name)(0, 0) for each in (single, chunked))
        assert a.tobytes() == b.tobytes()
    # Kernels round queries and weights of packed rows, 1e-5 and less of what attention gives.
    # Gemma makes its outputs, however small, as large as all else before it goes on.
    most = 5e-5 if make is small.gemma3 else 1e-5
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=most)


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_simulation_moves_when_the_cache_does(make: Any, options: dict[str, Any]) -> None:
    if options.get("threshold") == 1.0:
        pytest.skip("the simulation knows moves at commit alone")
    torch.manual_seed(0)
    model, ids = make().model, tokens()
    real = cache(model, options)
    logits = torch.cat([part for _, part in runs.feed(model, ids, real)])
    layers = model.config.get_text_config().num_hidden_layers
    rules = simulate.Rules.of(configurations.config_of(options))
    simulated = simulate.SimulatedCache(layers, rules)
    model.set_attn_implementation("sdpa")
    moved = []
    parts = []
    for fed, part in runs.feed(model, ids, simulated):
        moved.append((fed, simulated.hot_tokens, simulated.moved))
        parts.append(part)
    assert moved == [(point.tokens_seen, point.hot, point.moved) for point in real.cache.history]
    assert simulated.events == real.cache.stats().events
    exact = torch.cat([part for _, part in feed_exactly(model, ids)])
    lost = (logits - exact).norm() / exact.norm()
    apart = (torch.cat(parts) - logits).norm() / exact.norm()
    # Quantising shows in the logits; the two ways to do it differ by what goes to another level.
    assert apart < 0.1 * lost + 1e-4
    assert lost > (1e-3 if rules.hot_size else 0)


def feed_exactly(model: Any, ids: Any) -> Any:
    layers = model.config.get_text_config().num_hidden_layers
    exact = simulate.SimulatedCache(layers, simulate.Rules(hot_k_type="f32", hot_v_type="f32"))
    return runs.feed(model, ids, exact)
