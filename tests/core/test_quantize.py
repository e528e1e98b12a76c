"""Q4_0 conversion: bit for bit what the format says, on every ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import F16_EPS, normal

BLOCK = ref.QK4_0
F32_MAX = np.finfo(np.float32).max
TINY = np.finfo(np.float32).smallest_subnormal


def gguf_quantize(x: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0))


def gguf_dequantize(b: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(b, gguf.GGMLQuantizationType.Q4_0))


def one_hot(value: float, at: int) -> np.ndarray:
    x = np.zeros(BLOCK, np.float32)
    x[at] = value
    return x


def half_steps() -> np.ndarray:
    """Values that stand exactly between two quants, for d = 1 and d = -1."""
    x = (np.arange(-16, 16) / 2).astype(np.float32)
    return np.stack([np.r_[np.float32(-8), x[1:]], np.r_[np.float32(8), x[1:]]])


def near_half_steps() -> np.ndarray:
    """The neighbours of those ties, and scales whose inverse is rounded."""
    rows = []
    for scale in (1.0, 0.1, 1 / 3, 7.0, 1e-3, 1.7e5):
        for row in half_steps():
            x = (row * np.float32(scale)).astype(np.float32)
            rows += [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))]
    return np.stack(rows).astype(np.float32)


def equal_magnitudes() -> np.ndarray:
    """Which of them comes first decides the sign of d."""
    alternate = np.where(np.arange(BLOCK) % 2, -2.5, 2.5).astype(np.float32)
    late = np.zeros(BLOCK, np.float32)
    late[[15, 16]] = 3.0, -3.0
    early = np.zeros(BLOCK, np.float32)
    early[[3, 30]] = -3.0, 3.0
    return np.stack([alternate, -alternate, late, -late, early, -early])


def spread(rng: np.random.Generator) -> np.ndarray:
    """Magnitudes over the whole range of f32 for which 1 / d is finite."""
    exponents = rng.uniform(-36, 37.5, (400, 1))
    with np.errstate(over="ignore", under="ignore"):
        return (rng.uniform(-1, 1, (400, BLOCK)) * 10.0**exponents).astype(np.float32)


ADVERSARIAL: dict[str, Callable[[], np.ndarray]] = {
    "ties_between_quants": half_steps,
    "neighbours_of_ties": near_half_steps,
    "equal_magnitudes": equal_magnitudes,
    "one_non_zero": lambda: np.stack(
        [one_hot(v, at) for v in (1.0, -1.0, 0.3, -7.7e-20, 6.5e4) for at in range(BLOCK)]
    ),
    "negative_maximum": lambda: -np.linspace(0, 5, BLOCK, dtype=np.float32)[None],
    "positive_maximum": lambda: np.linspace(-4.9, 5, BLOCK, dtype=np.float32)[None],
    "constant": lambda: np.stack([np.full(BLOCK, v, np.float32) for v in (1, -1, 0.1, 3e38)]),
    "huge": lambda: np.stack(
        [one_hot(F32_MAX, 5), one_hot(-F32_MAX, 31), np.full(BLOCK, F32_MAX, np.float32)]
    ),
    "denormals_beside_one": lambda: np.r_[
        np.float32(1), np.full(BLOCK - 1, TINY, np.float32)
    ].astype(np.float32)[None],
    "zeros_of_both_signs_beside_one": lambda: np.where(
        np.arange(BLOCK) == 9, 1.5, np.where(np.arange(BLOCK) % 2, -0.0, 0.0)
    ).astype(np.float32)[None],
    "scale_denormal_in_f16": lambda: np.linspace(-3e-5, 2e-5, BLOCK, dtype=np.float32)[None],
    "scale_vanishes_in_f16": lambda: np.linspace(-3e-9, 2e-9, BLOCK, dtype=np.float32)[None],
    "scale_overflows_f16": lambda: np.linspace(-6e5, 5e5, BLOCK, dtype=np.float32)[None],
}

# 1 / d is infinite or there is no d: the sign of the zero that is stored is nobody's business.
VANISHING: dict[str, np.ndarray] = {
    "zeros": np.zeros(BLOCK, np.float32),
    "negative_zeros": np.full(BLOCK, -0.0, np.float32),
    "mixed_zeros": np.where(np.arange(BLOCK) % 2, -0.0, 0.0).astype(np.float32),
    "denormals": np.full(BLOCK, TINY, np.float32),
    "negative_denormals": np.linspace(-1e-40, 1e-40, BLOCK, dtype=np.float32),
    "below_1_over_d": np.linspace(-2.3e-38, 2.2e-38, BLOCK, dtype=np.float32),
}


# --- bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_quantize_adversarial_equals_gguf(isa: str, case: str) -> None:
    x = ADVERSARIAL[case]()
    got = mkv.quantize_q4_0(x, allow_non_finite=True)
    np.testing.assert_array_equal(got, gguf_quantize(x))


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_quantize_adversarial_equals_reference(isa: str, case: str) -> None:
    x = ADVERSARIAL[case]()
    np.testing.assert_array_equal(mkv.quantize_q4_0(x, allow_non_finite=True), ref.quantize_q4_0(x))


@pytest.mark.parametrize("case", VANISHING)
def test_quantize_vanishing_block_is_zero(isa: str, case: str) -> None:
    b = mkv.quantize_q4_0(VANISHING[case])
    np.testing.assert_array_equal(b[2:], np.full(16, 0x88, np.uint8))
    assert b[0] == 0
    assert b[1] in (0, 0x80)
    np.testing.assert_array_equal(mkv.dequantize_q4_0(b), np.zeros(BLOCK, np.float32))


@pytest.mark.parametrize("case", VANISHING)
def test_quantize_vanishing_block_same_bits_on_every_isa(case: str) -> None:
    before = mkv.isa.active()
    found = set()
    try:
        for name in mkv.isa.available():
            mkv.isa.select(name)
            found.add(mkv.quantize_q4_0(VANISHING[case]).tobytes())
    finally:
        mkv.isa.select(before)
    assert len(found) == 1


def test_quantize_every_magnitude_equals_gguf_and_reference(
    isa: str, rng: np.random.Generator
) -> None:
    x = spread(rng)
    got = mkv.quantize_q4_0(x, allow_non_finite=True)
    np.testing.assert_array_equal(got, ref.quantize_q4_0(x))
    np.testing.assert_array_equal(got, gguf_quantize(x))


@pytest.mark.parametrize("n", [32, 64, 96, 128, 160, 512, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_quantize_rows_equal_gguf(
    isa: str, rng: np.random.Generator, n: int, dtype: type[np.generic]
) -> None:
    x = normal(rng, 7, n).astype(dtype)
    got = mkv.quantize_q4_0(x)
    assert got.dtype == np.uint8
    assert got.shape == (7, n // 32 * 18)
    np.testing.assert_array_equal(got, gguf_quantize(x.astype(np.float32)))
    np.testing.assert_array_equal(got, ref.quantize_q4_0(x))


def test_quantize_every_finite_f16_equals_reference(isa: str) -> None:
    """Each f16 as the largest of its block and as one of the rest."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(np.float16)
    x = x[np.isfinite(x)]
    blocks = np.zeros((len(x), BLOCK), np.float16)
    blocks[:, 1] = x
    blocks[:, 17] = x / 2
    blocks[:, 30] = -x / 3
    np.testing.assert_array_equal(
        mkv.quantize_q4_0(blocks)[:, 2:], ref.quantize_q4_0(blocks)[:, 2:]
    )
    some = np.abs(x) > 0
    np.testing.assert_array_equal(mkv.quantize_q4_0(blocks[some]), ref.quantize_q4_0(blocks[some]))


def test_dequantize_every_scale_and_quant(isa: str) -> None:
    """All 65536 bit patterns of d that are not NaN, beside all 16 quants."""
    d = np.arange(1 << 16, dtype=np.uint16)
    d = d[~np.isnan(d.view(np.float16))]
    b = np.empty((len(d), 18), np.uint8)
    b[:, :2] = d.view(np.uint8).reshape(-1, 2)
    b[:, 2:] = (np.arange(16) | (15 - np.arange(16)) << 4).astype(np.uint8)
    want = ref.dequantize_q4_0(b)
    np.testing.assert_array_equal(mkv.dequantize_q4_0(b), want)
    np.testing.assert_array_equal(mkv.dequantize_q4_0(b), gguf_dequantize(b))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            mkv.dequantize_q4_0(b, dtype=np.float16, allow_non_finite=True),
            want.astype(np.float16),
        )


def test_quantize_hypothesis_equals_reference() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp

    width = st.integers(1, 4).map(lambda m: m * BLOCK)
    values = st.floats(allow_nan=False, allow_infinity=False, width=32)

    @given(width.flatmap(lambda n: hnp.arrays(np.float32, (2, n), elements=values)))
    def check(x: np.ndarray) -> None:
        got = mkv.quantize_q4_0(x, allow_non_finite=True)
        want = ref.quantize_q4_0(x)
        blocks = np.abs(x.reshape(-1, BLOCK)).max(axis=-1)
        usable = blocks > 2.4e-38
        got, want = got.reshape(-1, 18), want.reshape(-1, 18)
        np.testing.assert_array_equal(got[usable], want[usable])
        np.testing.assert_array_equal(got[:, 2:], want[:, 2:])

    check()


# --- round trips ----------------------------------------------------------------------------------


def test_quantize_round_trip_error_is_half_a_step(rng: np.random.Generator) -> None:
    x = normal(rng, 50, 128)
    y = mkv.dequantize_q4_0(mkv.quantize_q4_0(x))
    d = np.repeat(np.abs(x.reshape(50, -1, BLOCK)).max(-1) / 8, BLOCK, axis=-1)
    # Half a step, a whole one at the end that has no -8 of its own; d itself is rounded to f16.
    assert np.all(np.abs(x - y) <= d * (1 + 8 * F16_EPS))
    middle = np.abs(x) < 7 * d
    assert np.all(np.abs(x - y)[middle] <= d[middle] * (0.5 + 8 * F16_EPS))


def test_quantize_round_trip_of_dequantised_values_is_stable(rng: np.random.Generator) -> None:
    y = mkv.dequantize_q4_0(mkv.quantize_q4_0(normal(rng, 50, 128)))
    z = mkv.dequantize_q4_0(mkv.quantize_q4_0(y))
    np.testing.assert_array_equal(z, y)


def test_quantize_f16_equals_its_f32_values(isa: str, rng: np.random.Generator) -> None:
    x = normal(rng, 5, 3, 96).astype(np.float16)
    np.testing.assert_array_equal(mkv.quantize_q4_0(x), mkv.quantize_q4_0(x.astype(np.float32)))


# --- shapes, strides, out= ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 5, 32), (0, 64), (3, 0, 32)], ids=str)
def test_quantize_shapes(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x = normal(rng, *shape)
    b = mkv.quantize_q4_0(x)
    assert b.shape == (*shape[:-1], shape[-1] // 32 * 18)
    np.testing.assert_array_equal(b, ref.quantize_q4_0(x))
    y = mkv.dequantize_q4_0(b)
    assert y.shape == shape
    assert y.dtype == np.float32


STRIDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "permuted": lambda x: x.transpose(1, 0, 2),
    "every_other_row": lambda x: x[:, ::2],
    "rows_backwards": lambda x: x[::-1, ::-1],
    "sliced_inside_row": lambda x: x[..., 32:96],
    "values_apart": lambda x: x[..., ::2],
    "values_backwards": lambda x: x[..., ::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "fortran": lambda x: np.asfortranarray(x),
}


@pytest.mark.parametrize("case", STRIDED)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_quantize_strides(rng: np.random.Generator, case: str, dtype: type[np.generic]) -> None:
    x = STRIDED[case](normal(rng, 4, 6, 128).astype(dtype))
    np.testing.assert_array_equal(mkv.quantize_q4_0(x), ref.quantize_q4_0(np.ascontiguousarray(x)))


def test_quantize_unaligned_source(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 64)
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(np.float32).reshape(x.shape)
    view[:] = x
    np.testing.assert_array_equal(mkv.quantize_q4_0(view), ref.quantize_q4_0(x))


@pytest.mark.parametrize("case", ["permuted", "every_other_row"])
def test_dequantize_strides(rng: np.random.Generator, case: str) -> None:
    b = STRIDED[case](ref.quantize_q4_0(normal(rng, 4, 6, 128)))
    np.testing.assert_array_equal(mkv.dequantize_q4_0(b), ref.dequantize_q4_0(b))


def test_quantize_out_is_filled_and_returned(rng: np.random.Generator) -> None:
    x = normal(rng, 4, 64)
    out = np.full((4, 36), 255, np.uint8)
    assert mkv.quantize_q4_0(x, out=out) is out
    np.testing.assert_array_equal(out, ref.quantize_q4_0(x))
    back = np.full((4, 64), np.nan, np.float32)
    assert mkv.dequantize_q4_0(out, out=back) is back
    np.testing.assert_array_equal(back, ref.dequantize_q4_0(out))


def test_quantize_out_strided(rng: np.random.Generator) -> None:
    x = normal(rng, 4, 64)
    whole = np.full((8, 36), 255, np.uint8)
    mkv.quantize_q4_0(x, out=whole[::2])
    np.testing.assert_array_equal(whole[::2], ref.quantize_q4_0(x))
    assert np.all(whole[1::2] == 255)


def test_quantize_threads_same_bits(rng: np.random.Generator) -> None:
    x = normal(rng, 999, 128)
    want = ref.quantize_q4_0(x)
    before = mkv.get_num_threads()
    try:
        for threads in (1, 2, 5):
            mkv.set_num_threads(threads)
            np.testing.assert_array_equal(mkv.quantize_q4_0(x), want)
    finally:
        mkv.set_num_threads(before)


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_quantize_torch_in_torch_out(rng: np.random.Generator, name: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(rng, 3, 2, 64)).to(getattr(torch, name))
    b = mkv.quantize_q4_0(x)
    assert isinstance(b, torch.Tensor)
    assert b.dtype == torch.uint8
    assert b.shape == (3, 2, 36)
    np.testing.assert_array_equal(b.numpy(), ref.quantize_q4_0(x.float().numpy()))
    y = mkv.dequantize_q4_0(b)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.float32
    np.testing.assert_array_equal(y.numpy(), ref.dequantize_q4_0(b.numpy()))


@pytest.mark.torch
def test_quantize_torch_transposed(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(rng, 3, 5, 64)).transpose(0, 1)
    np.testing.assert_array_equal(mkv.quantize_q4_0(x).numpy(), ref.quantize_q4_0(x.numpy()))


@pytest.mark.torch
def test_quantize_torch_refuses_to_lose_a_gradient(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(rng, 3, 64)).requires_grad_()
    with pytest.raises(ValueError, match=r"x.*grad"):
        mkv.quantize_q4_0(x)
    with torch.no_grad():
        b = mkv.quantize_q4_0(x)
    np.testing.assert_array_equal(b.numpy(), ref.quantize_q4_0(x.detach().numpy()))


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.0, True, "2"], ids=repr)
def test_quantize_refuses_threads(threads: Any) -> None:
    x = np.zeros((2, 32), np.float32)
    with pytest.raises((TypeError, ValueError), match="threads"):
        mkv.quantize_q4_0(x, threads=threads)
    with pytest.raises((TypeError, ValueError), match="threads"):
        mkv.dequantize_q4_0(mkv.quantize_q4_0(x), threads=threads)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("at", [(0, 0), (2, 33), (4, 95)], ids=["first", "middle", "last"])
def test_quantize_refuses_non_finite_and_writes_nothing(
    isa: str, bad: float, dtype: type[np.generic], at: tuple[int, int]
) -> None:
    x = np.ones((5, 96), dtype)
    x[at] = bad
    out = np.full((5, 54), 170, np.uint8)
    with pytest.raises(ValueError, match=r"(?i)finite|nan|inf"):
        mkv.quantize_q4_0(x, out=out)
    assert np.all(out == 170)


@pytest.mark.parametrize("n", [1, 31, 33, 48, 100])
def test_quantize_refuses_other_widths(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        mkv.quantize_q4_0(np.zeros((2, n), np.float32))


@pytest.mark.parametrize("n", [1, 17, 19, 32])
def test_dequantize_refuses_other_widths(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        mkv.dequantize_q4_0(np.zeros((2, n), np.uint8))


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8", "bool", "complex64", "object"])
def test_quantize_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises((TypeError, ValueError), match=dtype):
        mkv.quantize_q4_0(np.zeros((2, 32), dtype))


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint16"])
def test_dequantize_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises((TypeError, ValueError), match=dtype):
        mkv.dequantize_q4_0(np.zeros((2, 18), dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, "nonsense", None], ids=str)
def test_dequantize_refuses_other_targets(dtype: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="dtype"):
        mkv.dequantize_q4_0(np.zeros((2, 18), np.uint8), dtype=dtype)


BAD_OUT: dict[str, np.ndarray] = {
    "shape": np.zeros((2, 18), np.uint8),
    "dtype": np.zeros((3, 18), np.int8),
    "read_only": np.broadcast_to(np.uint8(7), (3, 18)),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_quantize_refuses_bad_out(case: str) -> None:
    before = BAD_OUT[case].copy()
    with pytest.raises((TypeError, ValueError), match="out"):
        mkv.quantize_q4_0(np.ones((3, 32), np.float32), out=BAD_OUT[case])
    np.testing.assert_array_equal(BAD_OUT[case], before)


@pytest.mark.parametrize(
    "x", [None, 3.0, "text", [[1.0] * 32]], ids=["none", "float", "str", "list"]
)
def test_quantize_refuses_what_is_no_array(x: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        mkv.quantize_q4_0(x)


def test_quantize_refuses_a_scalar_array() -> None:
    with pytest.raises(ValueError, match="x"):
        mkv.quantize_q4_0(np.array(3.0, np.float32))
