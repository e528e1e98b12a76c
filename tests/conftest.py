"""Fixtures and tolerances shared by all tests, and a header that says what runs on this machine.

Long hypothesis runs: MIXEDKV_HYPOTHESIS_PROFILE=deep. What a machine lacks skips the tests that
need it; MIXEDKV_REQUIRE=llama,model makes that a failure (llama: llama-cpp-python; model: the
trained model; either: every module of the extra `test`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for reference and caches.py

import mixedkv as mkv
import reference as ref

# What files of tests share has asserts that should say as much as a test's own.
for subject in ("attention", "bench", "refusal", "state", "verify"):
    pytest.register_assert_rewrite(f"{subject}_cases")
pytest.register_assert_rewrite("tiny_models")

try:
    import hypothesis
except ImportError:  # the tests that need it skip themselves
    pass
else:
    quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": quiet}
    hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, **common)
    hypothesis.settings.register_profile("deep", max_examples=2000, **common)
    hypothesis.settings.load_profile(os.environ.get("MIXEDKV_HYPOTHESIS_PROFILE") or "ci")

# --- tolerances -----------------------------------------------------------------------------------

F32_EPS = float(np.finfo(np.float32).eps)
F16_EPS = float(np.finfo(np.float16).eps)

# Rounding in f32 of a sum of n products grows with sqrt(n) on average; logits of a few units are
# rounded, then exponentiated, so their absolute error is the relative one of the weights. 16 units
# hold for every size used here, with a wide tail.
F32_REL = 16 * F32_EPS
# Where a kernel rounds the query (Q4_0 keys) or the probabilities: norm over norm.
Q4_0_REL = 1e-3
# Segmented against whole, f16 and f32 keys and values, absolute.
SPLIT_ABS = 1e-5
# Against torch's SDPA in f32 on the same f16 keys and values, norm over norm.
TORCH_REL = 1e-5
# The debug case of the semantics.
DEBUG_ABS = 1e-6

KV_TYPES = ("f32", "f16", "q4_0")


def relative_error(got: Any, want: np.ndarray) -> float:
    """Norm of the difference over the norm, in float64; 0 where both are empty or zero."""
    got = np.asarray(got, np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    difference = float(np.linalg.norm(got - want))
    norm = float(np.linalg.norm(want))
    return difference / norm if norm > 0 else difference


def tolerance(*kinds: str) -> float:
    """Relative tolerance of attention over keys and values of these kinds."""
    return Q4_0_REL if "q4_0" in kinds else F32_REL


def assert_close(got: Any, want: np.ndarray, rel: float = F32_REL) -> None:
    """By norms, and element by element against the size of the row that it stands in."""
    got = np.asarray(got, np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.array_equal(np.isfinite(got), np.isfinite(want)), "non-finite values differ"
    odd = ~np.isfinite(want)
    np.testing.assert_array_equal(got[odd], want[odd])
    got, want = np.where(odd, 0.0, got), np.where(odd, 0.0, want)
    assert relative_error(got, want) <= rel
    if want.size and want.ndim:
        size = np.abs(want).max(axis=-1, keepdims=True) + np.abs(want).max()
        worst = float(np.max(np.abs(got - want) / np.maximum(size, 1e-30)))
        assert worst <= 2 * rel, f"element off by {worst:.3g} of its row's size"


def assert_lse_close(got: Any, want: np.ndarray, rel: float = F32_REL) -> None:
    """lse is a logarithm: an absolute error of it is a relative one of the sum."""
    got = np.asarray(got, np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    seen = np.isfinite(want)
    bound = rel * (4.0 + np.abs(want[seen]))
    error = np.abs(got[seen] - want[seen])
    assert np.all(error <= bound), f"lse off by {error.max():.3g}"


# --- data -----------------------------------------------------------------------------------------


def as_kind(x: np.ndarray, kind: str) -> np.ndarray:
    """f32 values as the array that the library takes for this kind."""
    x = np.asarray(x, np.float32)
    if kind == "f32":
        return x
    return x.astype(np.float16) if kind == "f16" else ref.quantize_q4_0(x)


def values_of(x: np.ndarray) -> np.ndarray:
    """The float64 values that an array in one of the kinds stands for."""
    return (ref.dequantize_q4_0(x) if x.dtype == np.uint8 else x).astype(np.float64)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(42)


@pytest.fixture(params=KV_TYPES)
def kv_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=mkv.isa.compiled())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every ISA of this build in turn, forced while the test runs."""
    name = str(request.param)
    if name not in mkv.isa.available():
        pytest.skip(f"this machine lacks {name}")
    before = mkv.isa.active()
    mkv.isa.select(name)
    assert mkv.isa.active() == name
    yield name
    mkv.isa.select(before)


OPTIONAL = ("core", "llama", "model")
OF_TEST = ("accelerate", "gguf", "matplotlib", "platformdirs", "rich", "transformers", "typer")


def required() -> set[str]:
    names = os.environ.get("MIXEDKV_REQUIRE", "").split(",")
    return {name.strip() for name in names if name.strip()}


def lacking(what: str, why: str) -> NoReturn:
    """Skip a test that needs something of OPTIONAL, or fail it where that is required."""
    if what in required():
        pytest.fail(f"MIXEDKV_REQUIRE={what}, and {why}")
    pytest.skip(why)


@pytest.fixture(scope="session")
def llama_cpp() -> Any:
    """llama-cpp-python."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # or its library does not load
        lacking("llama", f"llama-cpp-python can't be had: {error}")
    return llama_cpp


@pytest.fixture(scope="session")
def trained_model() -> Path:
    """The demo's model, as a GGUF file, with what reads it."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        from mixedkv.tools import models

        return models.fetch()
    except (ImportError, RuntimeError) as error:
        lacking("model", f"the model can't be had: {error}")


@pytest.fixture(params=["mixed", "unified", "mixed_one_tier"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Each kind of cache (see caches.py), for what they have in common."""
    from caches import MAKERS  # it takes tolerances from here

    return MAKERS[request.param]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "torch: needs PyTorch")
    unknown = required() - set(OPTIONAL)
    if unknown:
        raise pytest.UsageError(
            f"MIXEDKV_REQUIRE: {', '.join(sorted(unknown))} is none of {', '.join(OPTIONAL)}"
        )
    if required() - {"core"}:
        missing = [name for name in OF_TEST if importlib.util.find_spec(name) is None]
        if missing:
            raise pytest.UsageError(f"MIXEDKV_REQUIRE, and there is no {', '.join(missing)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    available = mkv.isa.available()
    lacking = [name for name in mkv.isa.compiled() if name not in available]
    try:
        import torch
    except ImportError:
        torch_version = "absent"
    else:
        torch_version = torch.__version__
    return [
        f"mixedkv {mkv.__version__}: ISA active {mkv.isa.active()}, tested {', '.join(available)}"
        f", skipped {', '.join(lacking) or 'none'}; {mkv.get_num_threads()} threads",
        f"numpy {np.__version__}, torch {torch_version}",
    ]
