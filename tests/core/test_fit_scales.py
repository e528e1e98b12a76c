"""fit_scales: ggml's bytes of Q4_0 and IQ4_NL, with scales of less squared error than ggml's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import normal

FITTED = ("q4_0", "iq4_nl")
F32_MAX = np.finfo(np.float32).max
LIMITS = {name: np.float32(mkv.formats.info(name).overflow or 0) for name in FITTED}


def spread(rng: np.random.Generator) -> np.ndarray:
    """Gaussian, uniform and heavy-tailed blocks of all magnitudes that an f16 scale reaches."""
    parts = [
        normal(rng, 500, 32),
        rng.uniform(-1, 1, (500, 32)),
        rng.standard_t(2, (500, 32)),
        rng.integers(-8, 8, (300, 32)),
    ]
    x = np.concatenate(parts)
    return np.asarray(x * np.exp2(rng.integers(-20, 12, (len(x), 1))), np.float32)


def ties(rng: np.random.Generator) -> np.ndarray:
    """Values where the two signs, or two levels, are as good: integers of few sizes, and halves."""
    few = rng.integers(-3, 4, (300, 32)) / 2
    pairs = np.tile([1.5, -1.5], (1, 16)) * np.array([[1], [-1], [1e-3], [7e4]])
    steps = np.arange(-16, 16)[None] * np.array([[0.5], [-0.5], [8], [127 / 16]])
    return np.concatenate([few, pairs, steps]).astype(np.float32)


def extremes(rng: np.random.Generator) -> np.ndarray:
    """Zeros, denormals, what overflows a scale, what overflows a square, what is no number."""
    sizes = (0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-16, 1e-15, 3e-8, 1e-6, 5e4, 5.3e5, 7.5e6)
    sizes += (1e12, 1e18, 1e19, 1e30, 3e38)
    rows = [normal(rng, 4, 32) / 5 * np.float32(size) for size in sizes]
    rows += [np.full((1, 32), size) for size in (*sizes, -0.0, -3e38, F32_MAX)]
    for name in FITTED:
        for limit in (LIMITS[name], np.nextafter(LIMITS[name], np.float32(0))):
            rows += [np.clip(normal(rng, 4, 32), -1, 1) * limit, np.full((1, 32), limit)]
    x = np.concatenate(rows).astype(np.float32)
    bad = normal(rng, 6, 32)
    bad[np.arange(6), [0, 5, 15, 16, 30, 31]] = [np.nan, np.inf, -np.inf, np.nan, np.inf, -np.inf]
    return np.concatenate([x, bad])


DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "spread": spread,
    "ties": ties,
    "extremes": extremes,
}


def fitted(x: Any, format: str, **options: Any) -> mkv.QuantizedArray:
    return mkv.quantize(x, format, fit_scales=True, allow_non_finite=True, **options)


def squares(x: np.ndarray, a: mkv.QuantizedArray) -> np.ndarray:
    """Squared errors of blocks, in float64."""
    with np.errstate(all="ignore"):
        error = x.astype(np.float64) - np.asarray(a, np.float32).astype(np.float64)
        result: np.ndarray = np.square(error).reshape(-1, 32).sum(-1)
    return result


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("format", FITTED)
def test_bytes_equal_reference(isa: str, rng: np.random.Generator, format: str, data: str) -> None:
    x = DATA[data](rng)
    got = fitted(x, format)
    np.testing.assert_array_equal(got.data, ref.fit_scales(x, format))
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    np.testing.assert_array_equal(fitted(half, format).data, ref.fit_scales(half, format))


@pytest.mark.parametrize("n", [32, 64, 96, 160, 512, 4096])
@pytest.mark.parametrize("format", FITTED)
def test_rows_of_any_length_equal_reference(
    isa: str, rng: np.random.Generator, format: str, n: int
) -> None:
    x = normal(rng, 5, 3, n)
    want = ref.fit_scales(x, format)
    np.testing.assert_array_equal(mkv.quantize(x, format, fit_scales=True).data, want)
    out = np.zeros((5, 3, n // 32 * 18 + 7), np.uint8)
    mkv.quantize(x, format, fit_scales=True, out=out[..., : n // 32 * 18])
    np.testing.assert_array_equal(out[..., : n // 32 * 18], want)
    assert not out[..., n // 32 * 18 :].any()


@pytest.mark.parametrize("format", FITTED)
def test_ggml_reads_the_bytes(format: str) -> None:
    gguf = pytest.importorskip("gguf")
    a = mkv.quantize(normal(np.random.default_rng(1), 300, 64), format, fit_scales=True)
    kind = gguf.GGMLQuantizationType[format.upper()]
    np.testing.assert_array_equal(np.asarray(a), gguf.quants.dequantize(a.data, kind))


@pytest.mark.parametrize("format", FITTED)
def test_threads_change_nothing(format: str) -> None:
    x = normal(np.random.default_rng(3), 3, 700, 64)
    one = mkv.quantize(x, format, fit_scales=True, threads=1)
    for threads in (2, 5):
        assert mkv.quantize(x, format, fit_scales=True, threads=threads) == one


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("format", FITTED)
def test_no_block_errs_more_than_ggmls(
    isa: str, rng: np.random.Generator, format: str, data: str
) -> None:
    x = DATA[data](rng)
    plain, got = mkv.quantize(x, format, allow_non_finite=True), fitted(x, format)
    changed = (plain.data != got.data).any(-1)
    assert (squares(x, got)[changed] < squares(x, plain)[changed]).all()
    # A search makes no scale finite that is not, and none infinite that is.
    finite = [np.isfinite(np.asarray(a)).all(-1) for a in (plain, got)]
    np.testing.assert_array_equal(*finite)
    with np.errstate(invalid="ignore"):
        assert finite[1][np.abs(x).max(-1) < LIMITS[format]].all()


def test_any_floats_equal_reference_and_err_no_more() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp

    values = st.floats(allow_nan=False, allow_infinity=False, width=32)

    @given(hnp.arrays(np.float32, (3, 64), elements=values), st.sampled_from(FITTED))
    def check(x: np.ndarray, format: str) -> None:
        got, plain = fitted(x, format), mkv.quantize(x, format, allow_non_finite=True)
        want = ref.fit_scales(x, format).reshape(-1, 18)
        # Of a block without a usable d the sign of its zero is nobody's business.
        none = (np.abs(x.reshape(-1, 32)).max(-1) <= 2.4e-38) & (
            got.data.reshape(-1, 18)[:, 0] == 0
        )
        np.testing.assert_array_equal(got.data.reshape(-1, 18)[~none], want[~none])
        changed = (plain.data != got.data).reshape(-1, 18).any(-1)
        assert (squares(x, got)[changed] < squares(x, plain)[changed]).all()

    check()


@pytest.mark.parametrize("format", FITTED)
def test_scales_are_near_the_best_there_are(format: str) -> None:
    """Against all scales of either sign in steps of a thousandth, in float64."""
    x = normal(np.random.default_rng(5), 300, 32).astype(np.float64)
    levels = np.array(range(-8, 8) if format == "q4_0" else ref.IQ4_NL_LEVELS, np.float64)
    top = np.abs(x).max(-1, keepdims=True) / np.abs(levels).max()
    best = np.full(len(x), np.inf)
    for factor in np.arange(0.6, 1.6, 1e-3):
        for sign in (1, -1):
            d = sign * factor * top
            near = np.abs((x / d)[..., None] - levels).argmin(-1)
            best = np.minimum(best, np.square(x - d * levels[near]).sum(-1))
    x32 = x.astype(np.float32)
    got = squares(x32, mkv.quantize(x32, format, fit_scales=True)).sum()
    plain = squares(x32, mkv.quantize(x32, format)).sum()
    # A search of eighteen comes as near as this to one of two thousand; ggml's rule does not.
    assert best.sum() < 1.01 * got
    assert got < 1.04 * best.sum()
    assert plain > 1.1 * best.sum()


# --- what takes the option ------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nl4", "nl3"])
def test_own_formats_are_fitted_anyway(isa: str, format: str) -> None:
    x = normal(np.random.default_rng(2), 20, 64)
    assert mkv.quantize(x, format, fit_scales=True) == mkv.quantize(x, format)


def test_formats_say_whether_they_have_a_choice() -> None:
    known = {name for name in mkv.formats.available() if mkv.formats.info(name).fits}
    assert known == {"q4_0", "iq4_nl", "nl4", "nl3"}


@pytest.mark.parametrize("format", ["q8_0", "bf16"])
def test_formats_without_a_choice_refuse(format: str) -> None:
    x = np.ones((2, 32), np.float32)
    out = np.zeros((2, mkv.formats.info(format).row_bytes(32)), np.uint8)
    words = (
        f"fit_scales must be False for {format}, whose blocks have no choice of scales, got True"
    )
    with pytest.raises(ValueError, match=words):
        mkv.quantize(x, format, fit_scales=True, out=out)
    assert not out.any()
    mkv.quantize(x, format, fit_scales=False, out=out)


def test_wrong_types_are_refused() -> None:
    x = np.ones((2, 32), np.float32)
    with pytest.raises(TypeError, match="fit_scales must be"):
        mkv.quantize(x, "q4_0", fit_scales=1)  # type: ignore[arg-type]
    bad = x.copy()
    bad[1, 3] = np.inf
    with pytest.raises(ValueError, match="inf"):
        mkv.quantize(bad, "q4_0", fit_scales=True)
