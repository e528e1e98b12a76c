"""What the installed package is, before any arithmetic."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixedkv as mkv
import pytest

PUBLIC = [
    "AttentionState",
    "CacheConfig",
    "CacheFull",
    "CacheStats",
    "MixedKVCache",
    "Slot",
    "StateFileError",
    "UnifiedKVCache",
    "attention",
    "dequantize_q4_0",
    "get_num_threads",
    "isa",
    "merge",
    "merge_state",
    "merge_states",
    "quantize_q4_0",
    "set_num_threads",
]


def test_package_version() -> None:
    assert isinstance(mkv.__version__, str)
    assert mkv.__version__[0].isdigit()
    try:
        installed = importlib.metadata.version("mixedkv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed, run from a build folder")
    assert mkv.__version__ == installed


def test_package_all_is_complete_and_true() -> None:
    assert set(PUBLIC) <= set(mkv.__all__)
    assert len(set(mkv.__all__)) == len(mkv.__all__)
    for name in mkv.__all__:
        assert hasattr(mkv, name), name


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "isa"])
def test_package_public_names_have_docstrings(name: str) -> None:
    assert getattr(mkv, name).__doc__


def test_package_is_typed() -> None:
    folder = Path(str(mkv.__file__)).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "_core.pyi").is_file()


def test_package_errors() -> None:
    assert issubclass(mkv.CacheFull, RuntimeError)
    assert issubclass(mkv.StateFileError, Exception)


def test_package_import_needs_numpy_alone() -> None:
    """torch, transformers and the extras are neither needed nor loaded."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'transformers', 'gguf', 'typer', 'rich', 'matplotlib',
                                  'platformdirs', 'hypothesis', 'pytest', 'safetensors'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np
import mixedkv as m
b = m.quantize_q4_0(np.ones((2, 32), np.float32))
assert m.attention(np.ones((1, 1, 32), np.float32), b[None], b[None]).shape == (1, 1, 32)
c = m.MixedKVCache(num_layers=1, num_kv_heads=1, head_dim=32, hot_size=32, cold_size=32)
assert len(c) == 0
print('fine')
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert got.returncode == 0, got.stderr
    assert got.stdout.strip() == "fine"


def test_package_import_does_not_load_torch() -> None:
    pytest.importorskip("torch")
    code = "import sys, mixedkv; print('torch' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip() == "False", got.stderr


def small_cache(**options: Any) -> mkv.MixedKVCache:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 32, "hot_size": 32, "cold_size": 32}
    return mkv.MixedKVCache(**{**sizes, **options})


@pytest.mark.parametrize(
    "options",
    [{"rope": object()}, {"rope": {"theta": 1e4}}],
    ids=["rope_object", "rope_dict"],
)
def test_package_later_options_are_not_implemented(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        small_cache(**options)


def test_package_state_files_are_not_implemented(tmp_path: Path) -> None:
    cache = small_cache()
    file = tmp_path / "state"
    with pytest.raises(NotImplementedError):
        cache.save(file)
    with pytest.raises(NotImplementedError):
        cache.save(file, seq=0)
    with pytest.raises(NotImplementedError):
        mkv.MixedKVCache.load(file)
    with pytest.raises(NotImplementedError):
        cache.load_into(file)
    assert not file.exists()
