"""Conversions refuse what a format does not keep, name the value, and write nothing.

The same rule for every format, and for float16: a finite value must stay finite, and a block takes
no infinity and no NaN. allow_non_finite takes the rule away.
"""

from __future__ import annotations

import re
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref

BLOCKS = [name for name in mkv.formats.packed() if name != "bf16"]
PACKED = mkv.formats.packed()


def limit(name: str) -> np.float32:
    """The least float32 that the format does not keep."""
    overflow = mkv.formats.info(name).overflow
    assert overflow is not None
    x = np.float32(overflow)
    assert float(x) == overflow
    return x


def test_limits_are_where_values_become_infinite(isa: str) -> None:
    """Just below a limit everything is finite, whatever else is in the block."""
    rng = np.random.default_rng(0)
    for name in PACKED:
        below = np.nextafter(limit(name), np.float32(0))
        x = (rng.uniform(-1, 1, (200, 64)) * below).astype(np.float32)
        x[:, 7] = below
        x[::2, 40] = -below
        x[100:, :7] = below
        assert np.isfinite(np.asarray(mkv.quantize(x, name))).all(), name
    assert mkv.formats.info("f32").overflow is None
    assert mkv.formats.info("f16").overflow == 65520.0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", PACKED)
def test_quantize_refuses_what_would_overflow(isa: str, name: str, sign: int) -> None:
    x = np.ones((4, 3, 128), np.float32)
    x[2, 1, 77] = sign * limit(name)
    x[3, 0, 5] = 3.4e38  # later
    out = np.full((4, 3, mkv.formats.info(name).row_bytes(128)), 7, np.uint8)
    message = (
        f"x must have magnitudes below {float(limit(name)):.9g} for {name}, got "
        f"x[2, 1, 77] = {float(x[2, 1, 77]):.9g}; nothing was written"
    )
    for threads in (1, 3):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            mkv.quantize(x, name, out=out, threads=threads)
    assert (out == 7).all()
    got = np.asarray(mkv.quantize(x, name, allow_non_finite=True))
    np.testing.assert_array_equal(got[:2], np.asarray(mkv.quantize(x[:2], name)))


def test_quantize_q4_0_refuses_likewise() -> None:
    x = np.ones((2, 64), np.float32)
    x[1, 63] = -524160.0
    with pytest.raises(ValueError, match=r"below 524160 for q4_0, got x\[1, 63\] = -524160"):
        mkv.quantize_q4_0(x)
    want = ref.quantize_q4_0(x)
    np.testing.assert_array_equal(mkv.quantize_q4_0(x, allow_non_finite=True), want)
    with pytest.raises(ValueError, match=r"got x\[63\] = -524160"):
        mkv.quantize_q4_0(x[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_refuses_what_is_not_finite(isa: str, name: str, bad: float, dtype: Any) -> None:
    x = np.ones((4, 192), dtype)
    x[2, 40] = bad
    out = np.full((4, mkv.formats.info(name).row_bytes(192)), 7, np.uint8)
    message = f"x must be finite for {name}, got x[2, 40] = {bad}; nothing was written"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mkv.quantize(x, name, out=out)
    assert (out == 7).all()
    got = np.asarray(mkv.quantize(x, name, allow_non_finite=True))
    block = mkv.formats.info(name).block_values
    at = 40 // block * block
    assert np.isnan(got[2, at : at + block]).all()
    got[2, at : at + block] = 1
    assert np.isfinite(got).all()


def test_bf16_keeps_what_is_not_finite(isa: str) -> None:
    x = np.array([1.0, np.inf, -np.inf, np.nan, 3.38e38], np.float32)
    kept = np.asarray(mkv.quantize(x, "bf16"))
    np.testing.assert_array_equal(kept, np.asarray(x.view(np.uint32) & 0xFFFF0000).view(np.float32))
    x[4] = 3.4e38
    with pytest.raises(ValueError, match=r"for bf16, got x\[4\] = 3.39999"):
        mkv.quantize(x, "bf16")
    got = np.asarray(mkv.quantize(x, "bf16", allow_non_finite=True))
    np.testing.assert_array_equal(got, [1.0, np.inf, -np.inf, np.nan, np.inf])


@pytest.mark.parametrize("name", PACKED)
def test_dequantize_to_f16_refuses_what_would_overflow(isa: str, name: str) -> None:
    x = np.ones((3, 128), np.float32)
    x[1, 70:90] = 65504.0
    fits = mkv.quantize(x, name)
    x[1, 80] = 1.2e5
    a = mkv.quantize(x, name)
    values = np.asarray(a)
    place = np.argwhere(np.abs(values) >= 65520)[0]
    out = np.full((3, 128), 7, np.float16)
    where = f"values[{place[0]}, {place[1]}] = {values[tuple(place)]:.9g}"
    with pytest.raises(ValueError, match=rf"below 65520 for f16, got {re.escape(where)};"):
        a.dequantize(np.float16, out=out)
    assert (out == 7).all()
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
        np.testing.assert_array_equal(a.dequantize(np.float16, allow_non_finite=True), want)
        if np.abs(np.asarray(fits)).max() < 65520:
            want = np.asarray(fits).astype(np.float16)
            np.testing.assert_array_equal(fits.dequantize(np.float16), want)
    np.testing.assert_array_equal(a.dequantize(), values)


def test_dequantize_q4_0_to_f16_refuses_likewise_and_keeps_infinities() -> None:
    b = mkv.quantize_q4_0(np.full((2, 32), 70000, np.float32))
    with pytest.raises(ValueError, match=r"f16, got b\[0, 0\] = 7"):
        mkv.dequantize_q4_0(b, dtype=np.float16)
    got = mkv.dequantize_q4_0(b, dtype=np.float16, allow_non_finite=True)
    assert np.isposinf(got).all()
    b[:, 2:] = 0x00  # nibbles of -8
    b[:, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    assert np.isneginf(mkv.dequantize_q4_0(b, dtype=np.float16)).all()
    b[:, 2:] = 0x88  # 0 times an infinity
    assert np.isnan(mkv.dequantize_q4_0(b, dtype=np.float16)).all()


def test_the_first_of_many_is_named_for_any_threads() -> None:
    rng = np.random.default_rng(1)
    x = np.ones((3000, 64), np.float32)
    rows = np.sort(rng.choice(3000, 40, replace=False))
    x[rows, rng.integers(0, 64, 40)] = 1e6
    column = int(np.argmax(x[rows[0]] > 1))
    for threads in (1, 2, 3, 8):
        with pytest.raises(ValueError, match=rf"got x\[{rows[0]}, {column}\] = 1000000"):
            mkv.quantize(x, "q4_0", threads=threads)


def test_allow_non_finite_is_a_bool() -> None:
    x = np.ones((1, 32), np.float32)
    for call in (
        lambda: mkv.quantize(x, "q4_0", allow_non_finite=1),  # type: ignore[arg-type]
        lambda: mkv.quantize_q4_0(x, allow_non_finite="no"),  # type: ignore[arg-type]
        lambda: mkv.quantize(x, "q4_0").dequantize(allow_non_finite=None),  # type: ignore[arg-type]
        lambda: mkv.dequantize_q4_0(mkv.quantize_q4_0(x), allow_non_finite=0),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="allow_non_finite must be a bool, got"):
            call()
