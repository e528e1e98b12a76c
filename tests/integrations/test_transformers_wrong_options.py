"""Every option of a MixedCache, given what it can't be: refused as the cache is made."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import mixedkv.integrations.transformers as mkt  # noqa: E402
from mixedkv.cache import presets  # noqa: E402
from tiny_models import SIZES  # noqa: E402
from wrong_values import cases, check_refused, label  # noqa: E402

CONFIG = transformers.LlamaConfig(**SIZES)
WRONG_OPTIONS = [
    pytest.param(*case, id=f"{case[0]}: {label(case[1])}")
    for case in cases(mkt.MixedCache, without=("config",))
]


@pytest.mark.parametrize("preset", [None, *presets.NAMES])
@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_option(preset: str | None, name: str, value: Any) -> None:
    options = {"cold_size": 64, "preset": preset, name: value}
    check_refused(lambda: mkt.MixedCache(CONFIG, **options), name, value)


# Without a cold tier these count for nothing beyond being numbers.
OF_TWO_TIERS = {"cold_size": 2**31, "sink_tokens": 10**6, "hot_keep": 10**6}


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_option_of_a_cache_of_one_tier(name: str, value: Any) -> None:
    if type(value) is int and value == OF_TWO_TIERS.get(name):
        mkt.MixedCache(CONFIG, hot_size=64, quantize=False, **{name: value})
        return
    options = {"hot_size": 64, "quantize": False, name: value}
    check_refused(lambda: mkt.MixedCache(CONFIG, **options), name, value)


@pytest.mark.parametrize("name", ["head_dim", "n_seq_max", "window_left", "layer_filter", "rope"])
def test_what_the_model_says_is_no_option(name: str) -> None:
    with pytest.raises(TypeError, match=f"takes {name} from the model"):
        mkt.MixedCache(CONFIG, **{name: 1})
