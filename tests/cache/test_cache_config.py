"""The options of the caches: a line each in C++ and in Python, and nothing else to keep in step."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from mixedkv import _core
from mixedkv.cache.config import OPTIONS, Option

BASE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 32}
IN_CORE = [option for option in OPTIONS.values() if not option.is_later]
LATER = [option for option in OPTIONS.values() if option.is_later]

# What Python leaves open is a value in C++.
OPEN = {"head_dim_v": 0, "layer_filter": []}


def other(option: Option) -> Any:
    """A value that is legal and not the default, by the type alone where that is enough."""
    if option.name == "layer_filter":
        return (1,)
    value = BASE.get(option.name, option.default)
    if option.name == "head_dim_v":
        value = BASE["head_dim"]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if value > 0 else 1
    if isinstance(value, float):
        return value / 2
    assert isinstance(value, str)
    return "f32"


def test_config_is_the_same_list_in_cpp_and_python() -> None:
    assert [name for name, _, _ in _core.cache_config_fields()] == [o.name for o in IN_CORE]
    for (name, default, meaning), option in zip(_core.cache_config_fields(), IN_CORE, strict=True):
        if name in OPEN:
            assert (option.default, default) == (None, OPEN[name])
            continue
        assert meaning == option.meaning
        assert isinstance(default, option.type)
        if option.default is not dataclasses.MISSING:
            assert (type(default), default) == (type(option.default), option.default), name


def test_config_says_what_every_option_means() -> None:
    for option in OPTIONS.values():
        assert option.meaning.endswith(".")
        assert option.meaning in str(mkv.CacheConfig.__doc__)


@pytest.mark.parametrize("option", IN_CORE, ids=lambda option: option.name)
def test_config_option_reaches_the_core(option: Option) -> None:
    """Through either door, and it alone."""
    value = other(option)
    plain = mkv.MixedKVCache(**BASE)._core.config()
    config = mkv.CacheConfig(**BASE).replace(**{option.name: value})
    caches = mkv.MixedKVCache(config), mkv.MixedKVCache(**{**BASE, option.name: value})
    for cache in caches:
        assert cache.config == config
        assert getattr(cache.config, option.name) == value
        found = cache._core.config()
        changed = {name for name in found if found[name] != plain[name]}
        assert changed == {option.name} | ({"head_dim_v"} if option.name == "head_dim" else set())
        assert found[option.name] == ([False, True] if option.name == "layer_filter" else value)


@pytest.mark.parametrize("option", LATER, ids=lambda option: option.name)
def test_config_option_of_later_is_refused(option: Option) -> None:
    mkv.CacheConfig(**BASE, **{option.name: option.default})
    for make in (mkv.CacheConfig, mkv.MixedKVCache, mkv.CacheConfig(**BASE).replace):
        with pytest.raises(NotImplementedError, match=f"{option.name} is not there yet.*got 7"):
            make(**{**BASE, option.name: 7})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 48}, "head_dim must be a multiple of 32 where cold_k_type is q4_0, got 48"),
        ({"hot_size": 33}, r"hot_size must be a positive multiple of n_pad \(32\).*got 33"),
        ({"sink_tokens": 900}, r"sink_tokens must stay.*got 900"),
        ({"n_seq_max": 2**31 - 1}, "n_seq_max must be at least 1 and at most 65536.*2147483647"),
        ({"num_layers": 2**31 - 1}, "num_layers must be at least 1 and at most 65536.*2147483647"),
        ({"num_layers": 2**40, "layer_filter": [0]}, "num_layers"),
        ({"num_kv_heads": 2**31 - 1, "hot_size": 2**30}, "num_kv_heads.*more than memory can be"),
        ({"hot_size": np.array([1, 2])}, r"hot_size must be an int, got ndarray array\(\[1, 2\]\)"),
        ({"rope": np.array([1, 2])}, r"rope is not there yet.*\[1 2\]"),
        ({"sink_tokens": np.array([1])}, r"sink_tokens must be an int, got ndarray array\(\[1\]\)"),
        ({"quantize": 1}, "quantize must be a bool, got int 1"),
        ({"layer_filter": [True]}, "layer_filter must.*layer indices, got bool True among them"),
        ({"layer_filter": np.array([True, False])}, "layer_filter must.*got bool.* among them"),
        ({"layer_filter": [0, "1"]}, "layer_filter must.*got str '1' among them"),
        ({"layer_filter": [0, 1, 2]}, "layer_filter must hold layers from 0 to 1, got 2"),
        ({"layer_filter": "01"}, "layer_filter must.*got str '01'"),
        ({"layer_filter": np.array(1)}, r"layer_filter must.*got ndarray array\(1\)"),
        ({"layer_filter": 1}, "layer_filter must.*got int 1"),
    ],
)
def test_config_refuses_at_construction(options: dict[str, Any], message: str) -> None:
    """By name and value, whether an option is wrong by itself or beside the others."""
    for make in (mkv.CacheConfig, mkv.MixedKVCache):
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            make(**{**BASE, **options})
    if "num_layers" not in options:
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            mkv.CacheConfig(**BASE).replace(**options)


def test_config_that_memory_can_not_hold_names_its_sizes() -> None:
    config = mkv.CacheConfig(**{**BASE, "num_layers": 2**16}, hot_size=2**30)
    with pytest.raises(MemoryError, match=r"hot_size=1073741824.*num_layers=65536"):
        mkv.MixedKVCache(config)
    with pytest.raises(MemoryError, match=r"a cache of size=1073741824, num_layers=65536"):
        mkv.UnifiedKVCache(**{**BASE, "num_layers": 2**16}, size=2**30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 33}, "^size must be a positive multiple of n_pad.*got 33"),
        ({"size": 2**33}, "^size must be.*got 8589934592"),
        ({"size": "x"}, "^size must be an int"),
        ({"k_type": "q4_0", "head_dim": 48}, "^head_dim.*multiple of 32 where k_type is q4_0.*48"),
        ({"v_type": "q8_0", "head_dim_v": 48}, "^head_dim_v.*where v_type is q8_0, got 48"),
        ({"size": 2**30, "num_kv_heads": 2**30}, "^size.*more than memory can be, got size 10737"),
    ],
)
def test_config_of_unified_cache_in_its_own_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        mkv.UnifiedKVCache(**{**BASE, **options})
    assert "hot_" not in str(error.value)
    assert "cold" not in str(error.value)


def test_unified_cache_that_is_full_says_so_in_its_own_words() -> None:
    cache = mkv.UnifiedKVCache(**BASE, size=32)
    rows = [np.zeros((1, 33, 32), np.float32)] * 2
    with pytest.raises(mkv.CacheFull, match=r"^no room for 33 tokens: 32 of 32 cells are free$"):
        cache.append(range(33), [0] * 33, rows, rows)


def test_config_of_unified_cache() -> None:
    cache = mkv.UnifiedKVCache(**BASE, size=64, k_type="f32", v_type="q4_0", window_left=5)
    config = cache.config
    assert (config.hot_size, config.hot_k_type, config.hot_v_type) == (64, "f32", "q4_0")
    assert (config.window_left, config.quantize) == (5, False)
    for options, name in (({"size": 0}, "size"), ({"v_type": "q5_0"}, "v_type.*q5_0")):
        with pytest.raises(ValueError, match=f"^{name}"):
            mkv.UnifiedKVCache(**BASE, **options)


def test_config_is_data() -> None:
    config = mkv.CacheConfig(**BASE, layer_filter=lambda layer: layer == 1)
    assert config.layer_filter == (1,)
    assert config == mkv.CacheConfig(**BASE, layer_filter=iter([1]))
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, config.replace(hot_size=64), config.replace()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hot_size = 3  # type: ignore[misc]


def test_config_shows_in_signatures() -> None:
    assert [*inspect.signature(mkv.CacheConfig).parameters] == [*OPTIONS]
    assert [*inspect.signature(mkv.MixedKVCache).parameters] == ["config", *OPTIONS]
    unified = inspect.signature(mkv.UnifiedKVCache).parameters
    assert [*unified] == [
        *("size", "k_type", "v_type"),
        *("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "n_pad", "n_seq_max"),
        *("rotate", "window_left", "rope", "layer_filter", "fit_scales"),
    ]


@pytest.mark.parametrize("make", [mkv.MixedKVCache, mkv.UnifiedKVCache])
def test_config_refuses_unknown_options_by_name(make: Any) -> None:
    with pytest.raises(TypeError, match="'hot_sizes'"):
        make(**BASE, hot_sizes=64)
    with pytest.raises(TypeError, match=r"'sinks'.*sink_tokens"):
        make(**BASE, sinks=4)
    with pytest.raises(TypeError, match="head_dim"):
        make(num_layers=1, num_kv_heads=1)


def test_config_replace_refuses_unknown_options_by_name() -> None:
    with pytest.raises(TypeError, match=r"'sinks'.*sink_tokens"):
        mkv.CacheConfig(**BASE).replace(sinks=4)
    with pytest.raises(ValueError, match=r"group_size.*-3"):
        mkv.CacheConfig(**BASE).replace(group_size=-3)


def test_config_or_options_not_both() -> None:
    config: Any = mkv.CacheConfig(**BASE)
    make: Any = mkv.MixedKVCache
    with pytest.raises(TypeError, match="not both"):
        make(config, hot_size=64)
    with pytest.raises(TypeError, match="config must be a CacheConfig, got int"):
        make(2)


def test_config_core_refuses_what_is_wrong() -> None:
    """The extension's own door: nothing is guessed there."""
    make: Any = _core.MixedCache
    right = {**BASE, "head_dim_v": 32}
    assert make(**right).config()["hot_size"] == 1024
    for options, message in (
        ({"hot_sizes": 1}, "'hot_sizes'"),
        ({"hot_size": "64"}, "hot_size must be an int of 64 bits, got '64'"),
        ({"hot_size": 2**70}, "hot_size"),
        ({"n_seq_max": 2**40}, "n_seq_max is out of range"),
        ({"threshold": None}, "threshold must be a float, got None"),
        ({"quantize": "no"}, "quantize must be a bool, got 'no'"),
        ({"hot_k_type": 3}, "hot_k_type must be a str, got 3"),
        ({"hot_k_type": "f8"}, "hot_k_type.*'f8'"),
        ({"layer_filter": [True]}, r"layer_filter must have num_layers \(2\) entries.*got 1"),
        ({"layer_filter": 3}, "layer_filter must be a list of bools, got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make(**{**right, **options})
