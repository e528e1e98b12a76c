"""Formats of rows: bytes bit for bit, QuantizedArray as a view of them, and every op over them."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import F32_REL, assert_close, normal, relative_error

#: ggml's formats of blocks, and ours.
GGML_BLOCKS = ("q4_0", "q8_0", "iq4_nl")
OWN = ("nl4", "nl3")
BLOCKS = (*GGML_BLOCKS, *OWN)
PACKED = (*BLOCKS, "bf16")
F32_MAX = np.finfo(np.float32).max

Make = Callable[[], np.ndarray]


def blocks_of(rng: np.random.Generator, n: int) -> np.ndarray:
    """Blocks of every magnitude that a float has, with ties, zeros and single values among them."""
    x = normal(rng, n, 32) * np.exp2(rng.integers(-110, 60, (n, 1))).astype(np.float32)
    x[: n // 4] = rng.integers(-3, 4, (n // 4, 32))
    x[n // 4 : n // 3] = 0
    x[np.arange(n // 4, n // 3), rng.integers(0, 32, n // 3 - n // 4)] = -1.5
    return x


def half_way() -> np.ndarray:
    """Values at, and one step from, what lies half way between two quants of a format."""
    rows = []
    halves = [np.arange(-63.5, 64.5, 4.0), np.arange(-16, 16) / 2]
    levels = np.array(ref.IQ4_NL_LEVELS, np.float32)
    halves.append(np.resize((levels[1:] + levels[:-1]) / 2, 32))
    for largest in (127.0, -127.0, 8.0, -8.0, 0.1, 3e-5, 1e10):
        for x in halves:
            row = (x * np.float32(abs(largest) / 127)).astype(np.float32)
            for step in (row, np.nextafter(row, np.float32(9e9)), np.nextafter(row, np.float32(0))):
                rows.append(np.r_[np.float32(largest), step[1:]])
    return np.stack(rows).astype(np.float32)


def extremes() -> np.ndarray:
    rows = []
    for value in (
        0.0,
        -0.0,
        1e-45,
        1e-40,
        2.9e-39,
        3e-39,
        1e-30,
        9.9e-16,
        1.1e-15,
        1e18,
        3e18,
        F32_MAX,
    ):
        x = np.zeros(32, np.float32)
        x[5] = value
        rows += [x, -x, np.full(32, value, np.float32), np.linspace(-1, 1, 32) * value]
    return np.stack(rows).astype(np.float32)


DATA: dict[str, Make] = {
    "random": lambda: blocks_of(np.random.default_rng(0), 400),
    "half way": half_way,
    "extremes": extremes,
}


def whole_blocks(x: np.ndarray, format: str) -> np.ndarray:
    """The rows of 32 values, two by two where a block of the format is larger."""
    n = max(32, mkv.formats.info(format).block_values)
    return x[: len(x) // 2 * 2].reshape(-1, n)


# --- the table ------------------------------------------------------------------------------------


def test_table_is_that_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    assert mkv.formats.available()[:3] == ["f32", "f16", "q4_0"]
    assert set(mkv.formats.packed()) == set(PACKED)
    for name in mkv.formats.available():
        one = mkv.formats.info(name)
        assert one.packed == (name in PACKED)
        assert one.bits == 8 * one.block_bytes / one.block_values
        assert one.row_values(one.row_bytes(192)) == 192
        if name in OWN:
            assert one.ggml_type is None
            continue
        number = gguf.GGMLQuantizationType[name.upper()]
        assert one.name == name
        assert one.ggml_type == number
        assert (one.block_values, one.block_bytes) == gguf.GGML_QUANT_SIZES[number]


def test_table_names_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"name must be 'f32', .* or 'nl3', got 'q4_1'"):
        mkv.formats.info("q4_1")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        mkv.formats.info(2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be a multiple of 32, got 33"):
        mkv.formats.info("q8_0").row_bytes(33)
    with pytest.raises(ValueError, match="num_bytes must be a multiple of 34, got 33"):
        mkv.formats.info("q8_0").row_values(33)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("data", DATA)
def test_quantize_equals_reference(isa: str, format: str, data: str) -> None:
    x = whole_blocks(DATA[data](), format)
    pack, unpack = ref.PACKED[format]
    got = mkv.quantize(x, format, allow_non_finite=True)
    np.testing.assert_array_equal(got.data, pack(x))
    np.testing.assert_array_equal(got.dequantize(), unpack(got.data))
    np.testing.assert_array_equal(np.asarray(got), unpack(got.data))
    with np.errstate(over="ignore"):
        want = unpack(got.data).astype(np.float16)
        np.testing.assert_array_equal(got.dequantize(np.float16, allow_non_finite=True), want)
    with np.errstate(over="ignore"):
        half = np.clip(x, -60000, 60000).astype(np.float16)
    np.testing.assert_array_equal(mkv.quantize(half, format).data, pack(half))


def test_q8_0_equals_gguf(isa: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    for data, make in DATA.items():
        x = make()
        with np.errstate(all="ignore"):
            usable = np.isfinite(np.float32(1) / (np.abs(x).max(-1) / np.float32(127)))
            usable |= ~x.any(-1)
            want = gguf.quants.quantize(x[usable], kind)
            got = mkv.quantize(x[usable], "q8_0", allow_non_finite=True)
            np.testing.assert_array_equal(got.data, want, err_msg=data)
            np.testing.assert_array_equal(np.asarray(got), gguf.quants.dequantize(want, kind))


def test_iq4_nl_values_equal_gguf(isa: str) -> None:
    """gguf reads IQ4_NL; it has no way to write it."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (300, 5 * 18), np.uint8)
    data[:, 1::18] &= 0xBB  # finite scales
    a = mkv.QuantizedArray(data, "iq4_nl")
    want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.IQ4_NL)
    np.testing.assert_array_equal(np.asarray(a), want)


def ggml() -> ctypes.CDLL:
    """ggml's own library, where the bench has built or found one."""
    from mixedkv.tools.bench.peers.ggml_library import find_libraries

    found = find_libraries(None)
    if found is None:
        pytest.skip("ggml's library is not built: mixedkv bench --build-ggml")
    return ctypes.CDLL(str(found / "libggml-base.so"), ctypes.RTLD_GLOBAL)


@pytest.mark.parametrize("format", GGML_BLOCKS)
@pytest.mark.parametrize("data", DATA)
def test_bytes_equal_ggml(isa: str, format: str, data: str) -> None:
    """What a cache of ggml converts with: quantize_row_<format>_ref."""
    library = ggml()
    x = np.ascontiguousarray(DATA[data]())
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(-1)
        if format == "iq4_nl":
            # Below, ggml leaves q to what lay in memory; far above, its d is a NaN.
            usable = (largest >= 1e-15) & (largest <= 1e12)
        else:
            divisor = np.float32(8 if format == "q4_0" else 127)
            usable = np.isfinite(np.float32(1) / (largest / divisor)) | (largest == 0)
    x = x[usable]
    want = np.empty((len(x), mkv.formats.info(format).row_bytes(32)), np.uint8)
    function = getattr(library, f"quantize_row_{format}_ref")
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function(x.ctypes.data, want.ctypes.data, x.size)
    np.testing.assert_array_equal(mkv.quantize(x, format, allow_non_finite=True).data, want)


def test_bf16_equals_torch(isa: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    x = rng.integers(0, 2**32, (50, 37), np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        x = np.where(np.isnan(x), np.float32(1), x)
        want = torch.from_numpy(x).bfloat16()
        got = mkv.quantize(x, "bf16", allow_non_finite=True)
    np.testing.assert_array_equal(got.data, want.view(torch.uint8).numpy())
    np.testing.assert_array_equal(np.asarray(got), want.float().numpy())


@pytest.mark.parametrize("format", BLOCKS)
def test_a_block_that_is_not_finite_reads_back_as_nan_in_a_cache(isa: str, format: str) -> None:
    cache = mkv.UnifiedKVCache(
        num_layers=1, num_kv_heads=1, head_dim=128, size=32, k_type=format, v_type=format
    )
    k = np.ones((1, 2, 128), np.float32)
    k[0, 1, 70] = np.inf
    first = slice(64, 64 + mkv.formats.info(format).block_values)
    cache.append([0, 1], [0, 0], [k], [np.ones_like(k)])
    got = cache.keys(0, 0)[0]
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, first]).all()
    assert np.isfinite(np.delete(got[1], first)).all()


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_convert_has_the_same_bytes_for_any_threads(format: str, threads: int) -> None:
    x = normal(np.random.default_rng(3), 5, 700, 64)
    a = mkv.quantize(x, format, threads=threads)
    assert a == mkv.quantize(x, format, threads=1)
    np.testing.assert_array_equal(a.dequantize(threads=threads), a.dequantize(threads=1))


# --- QuantizedArray -------------------------------------------------------------------------------


@pytest.fixture(params=PACKED)
def array(request: pytest.FixtureRequest) -> mkv.QuantizedArray:
    return mkv.quantize(normal(np.random.default_rng(4), 2, 3, 5, 64), request.param)


def values(a: mkv.QuantizedArray) -> np.ndarray:
    return np.asarray(a)


def test_quantized_array_says_what_it_is(array: mkv.QuantizedArray) -> None:
    one = mkv.formats.info(array.format)
    assert array.shape == (2, 3, 5, 64)
    assert array.ndim == 4
    assert len(array) == 2
    assert array.size == 1920
    assert array.nbytes == 1920 * one.block_bytes // one.block_values
    assert array.data.dtype == np.uint8
    assert array.data.shape == (2, 3, 5, one.row_bytes(64))
    assert repr(array) == (
        f"QuantizedArray({array.format}, shape=(2, 3, 5, 64), numpy, {array.nbytes} bytes)"
    )


@pytest.mark.parametrize(
    "index",
    [
        np.s_[1],
        np.s_[-1, :, 2],
        np.s_[..., 3:4, :],
        np.s_[:, ::2, ::-1],
        np.s_[:, None, 1, ..., :],
        np.s_[0, ..., :64],
        np.s_[[1, 0, 1]],
        np.s_[:, [0, 2], [1, 4]],
        np.s_[[1, 0], :, [1, 4]],
        np.s_[np.array([True, False])],
        np.s_[np.ones((2, 3), bool)],
        np.s_[:, :, 5:, :],
        np.s_[...],
        np.s_[()],
    ],
    ids=str,
)
def test_quantized_array_is_indexed_like_its_values(array: mkv.QuantizedArray, index: Any) -> None:
    got = array[index]
    want = values(array)[index]
    assert got.shape == want.shape
    assert got.format == array.format
    np.testing.assert_array_equal(values(got), want)


@pytest.mark.parametrize(
    "index",
    [
        np.s_[0, 0, 0, 0],
        np.s_[..., 0],
        np.s_[..., :32],
        np.s_[..., ::2],
        np.s_[..., ::-1],
        np.s_[..., None],
        np.s_[:, :, :, [0]],
        np.s_[:, :, :, :, None],
        np.s_[..., np.ones(64, bool)],
        np.s_[np.ones((2, 3, 5, 64), bool)],
    ],
    ids=lambda index: str(index)[:40],
)
def test_quantized_array_keeps_its_last_axis_whole(array: mkv.QuantizedArray, index: Any) -> None:
    with pytest.raises(IndexError, match="the last axis of a QuantizedArray holds whole blocks"):
        array[index]


def test_quantized_array_refuses_other_wrong_indices(array: mkv.QuantizedArray) -> None:
    with pytest.raises(IndexError, match="too many indices: 5 for 4 axes"):
        array[0, 0, 0, 0, 0]
    with pytest.raises(IndexError, match="single ellipsis"):
        array[..., ...]
    with pytest.raises(IndexError, match="a bool is no index"):
        array[True]
    with pytest.raises(IndexError):
        array[2]
    with pytest.raises(IndexError, match="the last axis"):
        array[0, 0, 0][0]
    with pytest.raises(TypeError, match="no rows to iterate over"):
        iter(array[0, 0, 0])


def test_quantized_array_slices_are_views(array: mkv.QuantizedArray) -> None:
    part = array[:, 1:]
    assert np.shares_memory(part.data, array.data)
    assert [one.shape for one in array] == [(3, 5, 64)] * 2
    assert all(one == array[i] for i, one in enumerate(array))


def test_quantized_array_takes_other_shapes(array: mkv.QuantizedArray) -> None:
    x = values(array)
    for shape in ((6, 5, 64), (-1, 64), (2, -1, 5, 64), (30, -1), (1, 2, 3, 5, 64)):
        np.testing.assert_array_equal(values(array.reshape(*shape)), x.reshape(shape))
        np.testing.assert_array_equal(values(array.reshape(shape)), x.reshape(shape))
    for a, b in ((0, 1), (1, 2), (-2, 0), (3, 3)):
        np.testing.assert_array_equal(values(array.swapaxes(a, b)), x.swapaxes(a, b))
    np.testing.assert_array_equal(values(array.transpose(2, 0, 1, 3)), x.transpose(2, 0, 1, 3))
    np.testing.assert_array_equal(values(array.transpose((1, 0, 2, -1))), x.transpose(1, 0, 2, 3))
    for shape in ((2, 3, 5 * 64), (2, 3, 10, 32), (2, 3, -1), ()):
        with pytest.raises(ValueError, match="last axis"):
            array.reshape(shape)
    for axes in ((3, 0, 1, 2), (0, 1, 2), (0, 0, 1, 3)):
        with pytest.raises(ValueError, match="the last one last"):
            array.transpose(*axes)
    with pytest.raises(ValueError, match="the last one last"):
        array.swapaxes(0, 3)
    with pytest.raises(ValueError, match="axis 4 is out of range"):
        array.swapaxes(0, 4)


def test_quantized_array_copies(array: mkv.QuantizedArray) -> None:
    for twin in (array.copy(), copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        assert twin == array
        assert not np.shares_memory(twin.data, array.data)
    assert copy.copy(array) == array
    strided = array[::-1, :, ::2]
    assert strided.copy() == strided == pickle.loads(pickle.dumps(strided))


def test_quantized_array_equality_is_of_format_shape_and_bytes(array: mkv.QuantizedArray) -> None:
    other = array.copy()
    other.data[0, 0, 0, 0] ^= 1
    assert array != other
    assert array == array.copy()
    assert array != array.reshape(6, 5, 64)
    assert (array == values(array)).all()  # numpy's own, value by value
    assert array != "q4_0"
    zeros = np.zeros((3, 18), np.uint8)
    assert mkv.QuantizedArray(zeros, "q4_0") != mkv.QuantizedArray(zeros, "iq4_nl")
    with pytest.raises(TypeError, match="unhashable"):
        hash(array)


def test_quantized_array_as_numpy(array: mkv.QuantizedArray) -> None:
    x = array.dequantize()
    assert np.asarray(array).dtype == np.float32
    assert np.asarray(array, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.array(array, np.float16), x.astype(np.float16))
    np.testing.assert_array_equal(np.add(array, 1), x + 1)
    with pytest.raises(ValueError, match=r"can't be had without a copy|copy"):
        array.__array__(copy=False)


def test_quantized_array_of_torch(array: mkv.QuantizedArray) -> None:
    torch = pytest.importorskip("torch")
    a = array.torch()
    assert torch.is_tensor(a.data)
    assert a.data.data_ptr() == array.data.ctypes.data
    assert a.torch() is a
    assert a == array
    assert a.numpy() == array
    assert "torch" in repr(a)
    assert a.nbytes == array.nbytes
    assert a.shape == array.shape
    for dtype in (torch.float32, torch.float16, np.float32):
        assert torch.is_tensor(a.dequantize(dtype))
    np.testing.assert_array_equal(a.dequantize().numpy(), values(array))
    part = a[:, [0, 2], ..., 1:3, :]
    np.testing.assert_array_equal(values(part), values(array)[:, [0, 2], ..., 1:3, :])
    moved = a.transpose(1, 0, 2, 3)[torch.tensor([True, False, True])]
    np.testing.assert_array_equal(values(moved), values(array).transpose(1, 0, 2, 3)[[0, 2]])
    assert a.swapaxes(0, 1).reshape(3, -1, 64).shape == (3, 10, 64)
    assert a.copy() == copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == array
    quantised = mkv.quantize(torch.ones(3, 64), array.format)
    assert torch.is_tensor(quantised.data)


def test_quantized_array_views_bf16_of_any_kind() -> None:
    torch = pytest.importorskip("torch")
    t = torch.randn(3, 5, 40).bfloat16()
    a = mkv.QuantizedArray(t, "bf16")
    assert a.data.data_ptr() == t.data_ptr()
    assert a.shape == (3, 5, 40)
    np.testing.assert_array_equal(values(a), t.float().numpy())
    halves = t.view(torch.int16).numpy()
    for data in (halves, halves.view(np.uint16), halves.view(np.uint8)):
        assert mkv.QuantizedArray(data, "bf16") == a
    strided = mkv.QuantizedArray(t[..., ::2], "bf16")
    np.testing.assert_array_equal(values(strided), t[..., ::2].float().numpy())
    # Numbers at an odd address are copied before they are read.
    buffer = np.zeros(halves.nbytes + 1, np.uint8)
    buffer[1:] = halves.view(np.uint8).ravel()
    odd = mkv.QuantizedArray(buffer[1:].reshape(3, 5, 80), "bf16")
    np.testing.assert_array_equal(values(odd), values(a))
    q = normal(np.random.default_rng(5), 3, 1, 40)
    np.testing.assert_array_equal(mkv.attention(q, odd, odd), mkv.attention(q, a, a))
    with pytest.raises(ValueError, match="data requires grad"):
        mkv.QuantizedArray(t.clone().requires_grad_(), "bf16")


def test_quantized_array_refuses_what_is_no_rows() -> None:
    row = np.zeros((2, 36), np.uint8)
    for format in ("f32", "f16"):
        with pytest.raises(ValueError, match=f"format must not be '{format}': such rows are plain"):
            mkv.QuantizedArray(row, format)
        with pytest.raises(ValueError, match=f"format must not be '{format}'"):
            mkv.quantize(np.zeros(32, np.float32), format)
    with pytest.raises(ValueError, match=r"format must be 'q4_0', .*, got 'int8'"):
        mkv.QuantizedArray(row, "int8")
    with pytest.raises(TypeError, match="format must be a str, got NoneType"):
        mkv.QuantizedArray(row, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a multiple of 34 bytes.*q8_0.*\(2, 36\)"):
        mkv.QuantizedArray(row, "q8_0")
    with pytest.raises(TypeError, match="data must be uint8, got float32"):
        mkv.QuantizedArray(row.astype(np.float32), "q4_0")
    with pytest.raises(TypeError, match="data must be uint8, got uint16"):
        mkv.QuantizedArray(row.view(np.uint16), "q4_0")
    with pytest.raises(TypeError, match="data must be uint8, uint16, int16 or bfloat16"):
        mkv.QuantizedArray(row.astype(np.float32), "bf16")
    with pytest.raises(TypeError, match="data must be a numpy array or a torch CPU"):
        mkv.QuantizedArray([1, 2], "q4_0")
    with pytest.raises(TypeError, match="got QuantizedArray"):
        mkv.QuantizedArray(mkv.QuantizedArray(row, "q4_0"), "q4_0")
    for data in (np.array(3, np.uint8), np.array(3, np.uint16)):
        with pytest.raises(ValueError, match="data must have one axis at least, got a scalar"):
            mkv.QuantizedArray(data, "bf16")


@pytest.mark.parametrize("format", PACKED)
def test_quantize_fills_out(format: str) -> None:
    x = normal(np.random.default_rng(6), 2, 3, 64)
    want = mkv.quantize(x, format)
    wide = np.zeros((2, 6, want.data.shape[-1]), np.uint8)
    out = mkv.QuantizedArray(wide, format)[:, ::2]
    assert mkv.quantize(x, format, out=out) is out
    assert out == want
    assert (wide[:, 1::2] == 0).all()
    bare = np.empty_like(want.data)
    got = mkv.quantize(x, format, out=bare)
    assert got == want
    assert np.shares_memory(got.data, bare)
    y = np.empty(x.shape, np.float16)
    assert want.dequantize(np.float16, out=y) is y
    np.testing.assert_array_equal(y, want.dequantize(np.float16))
    other = "q8_0" if format != "q8_0" else "q4_0"
    with pytest.raises(ValueError, match=f"out must be of format {other}, got {format}"):
        mkv.quantize(x, other, out=out)
    with pytest.raises(ValueError, match=r"out must have shape \(2, 64\), got \(2, 3, 64\)"):
        mkv.quantize(x[:, 0], format, out=out)
    with pytest.raises(ValueError, match="out must have shape"):
        want.dequantize(out=np.empty((2, 3, 32), np.float32))
    with pytest.raises(TypeError, match="dtype must be float32 or float16, got"):
        want.dequantize(np.float64)


@pytest.mark.parametrize("format", BLOCKS)
def test_quantize_refuses_parts_of_blocks(format: str) -> None:
    n = mkv.formats.info(format).block_values
    with pytest.raises(ValueError, match=rf"must be a multiple of {n} for .*got shape \(2, 40\)"):
        mkv.quantize(np.zeros((2, 40), np.float32), format)
    with pytest.raises(TypeError, match="x must be float32 or float16, got float64"):
        mkv.quantize(np.zeros((2, 64)), format)
    with pytest.raises(ValueError, match="x must have one axis at least"):
        mkv.quantize(np.ones((), np.float32), format)


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0, 64), (2, 0)])
def test_quantized_array_may_be_empty(format: str, shape: tuple[int, ...]) -> None:
    a = mkv.quantize(np.zeros(shape, np.float32), format)
    assert a.shape == shape
    assert a.size == a.nbytes == 0
    assert np.asarray(a).shape == shape
    assert a == pickle.loads(pickle.dumps(a))
    assert a.copy() == a


def test_quantize_of_many_rows() -> None:
    """More values than an int of 32 bits counts bits of, in rows that are one long one."""
    x = np.zeros((1 << 16, 1024), np.float16)
    x[-1, -1] = 3.0
    for format in PACKED:
        a = mkv.quantize(x, format)
        assert not a[:-1].data[:, ::2].any() or format not in ("q8_0", "bf16")
        last = np.asarray(a[-1])
        # No level of ours is zero, which the scale of a lone value pays for.
        assert last[-1] == pytest.approx(3.0, rel=0.2 if format in OWN else 1e-2)
        assert np.abs(last[:-1]).max() <= (0.2 if format in OWN else 0.03)


# --- every op -------------------------------------------------------------------------------------

KINDS = ("f32", "f16", *PACKED)


def rows_as(x: np.ndarray, kind: str) -> Any:
    if kind in PACKED:
        return mkv.quantize(x, kind)
    return x.astype({"f32": np.float32, "f16": np.float16}[kind])


@pytest.mark.parametrize("v_kind", KINDS)
@pytest.mark.parametrize("k_kind", KINDS)
def test_attention_over_every_pair(isa: str, k_kind: str, v_kind: str) -> None:
    rng = np.random.default_rng(7)
    for qo_len, kv_len in ((1, 70), (3, 33), (40, 64)):
        q = normal(rng, 2, 6, qo_len, 64)
        k = rows_as(normal(rng, 2, 2, kv_len, 64), k_kind)
        width = 192 if v_kind == "nl4" else 96
        v = rows_as(normal(rng, 2, 2, kv_len, width), v_kind)
        want, _ = ref.attention(
            q, np.asarray(k, np.float64), np.asarray(v, np.float64), causal=True
        )
        got = mkv.attention(q, k, v, causal=True)
        # neon_dotprod and its kin round the query over rows of Q4_0.
        rel = 1e-3 if k_kind == "q4_0" and isa.startswith("neon_") else F32_REL
        assert_close(got, want, rel)

        state = mkv.AttentionState(6, qo_len, width, batch=2)
        for part in (np.s_[:, :, :20], np.s_[:, :, 20:]):
            start = 0 if part == np.s_[:, :, :20] else 20
            state.update(q, k[part], v[part], causal=True, q_start=kv_len - qo_len, kv_start=start)
        assert relative_error(state.finalize(), want) <= max(rel, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_takes_views(isa: str, kind: str) -> None:
    """Strided rows, another layout, torch tensors: the same bits."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    q = normal(rng, 1, 4, 2, 64)
    k = rows_as(normal(rng, 1, 30, 4, 64), kind)
    v = rows_as(normal(rng, 1, 30, 4, 64), kind)
    k, v = k[:, ::2, 1:3], v[:, ::2, 1:3]
    want = mkv.attention(q.swapaxes(1, 2).copy(), k, v, layout="NHD")
    hnd = (k.swapaxes(1, 2), v.swapaxes(1, 2))
    np.testing.assert_array_equal(mkv.attention(q, *hnd), want.swapaxes(1, 2))
    copies = [x.copy() for x in hnd]
    np.testing.assert_array_equal(mkv.attention(q, *copies), want.swapaxes(1, 2))
    tensors = [x.torch() if kind in PACKED else torch.from_numpy(x) for x in copies]
    got = mkv.attention(torch.from_numpy(q), *tensors)
    assert torch.is_tensor(got)
    np.testing.assert_array_equal(got.numpy(), want.swapaxes(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_paged_attention_has_the_bits_of_attention(isa: str, kind: str) -> None:
    rng = np.random.default_rng(10)
    k = rows_as(normal(rng, 7, 2, 16, 64), kind)
    v = rows_as(normal(rng, 7, 2, 16, 64), kind)
    q = normal(rng, 2, 4, 64)
    lists = ([5, 0, 3], [6, 1])
    got = mkv.attention_paged(q, (k, v), [0, 3, 5], [*lists[0], *lists[1]], [9, 16])
    for b, (pages, length) in enumerate(zip(lists, (41, 32), strict=True)):
        rows = [x[pages].swapaxes(0, 1).reshape(2, -1, 64)[:, :length] for x in (k, v)]
        np.testing.assert_array_equal(got[b], mkv.attention(q[b][:, None], *rows)[:, 0])


def test_attention_reads_bfloat16_tensors_as_they_are(isa: str) -> None:
    torch = pytest.importorskip("torch")
    t = torch.randn(1, 2, 9, 40).bfloat16()
    q = torch.randn(1, 4, 3, 40).bfloat16()
    got = mkv.attention(q, t, t)
    assert got.dtype == torch.bfloat16
    want = mkv.attention(q, t.float(), t.float())
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="k requires grad"):
        mkv.attention(q, t.clone().requires_grad_(), t)


def test_attention_names_the_array_that_does_not_fit() -> None:
    q = np.zeros((2, 1, 64), np.float32)
    a = mkv.quantize(np.zeros((2, 3, 32), np.float32), "q8_0")
    with pytest.raises(ValueError, match="k must have q's head_dim 64, got 32"):
        mkv.attention(q, a, a)
    with pytest.raises(TypeError, match="q must be a numpy array or a torch CPU tensor"):
        mkv.attention(a, a, a)
    with pytest.raises(TypeError, match=r"k must be float32, float16 or uint8 \(Q4_0 rows\), got"):
        mkv.attention(q, np.zeros((2, 3, 64), np.uint16), a)
    with pytest.raises(ValueError, match="Q4_0 rows in v must be a multiple of 18 bytes"):
        mkv.attention(q, np.zeros((2, 3, 64), np.float32), np.zeros((2, 3, 34), np.uint8))
    k = mkv.quantize(np.ones((2, 3, 64), np.float32), "bf16")
    out = k.data.view(np.float32)[..., :1]
    with pytest.raises(ValueError, match="out must not share memory with k"):
        mkv.attention(q, k, np.zeros((2, 3, 1), np.float32), out=out[:, :1])


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", KINDS)
@pytest.mark.parametrize("hot", KINDS)
def test_cache_holds_every_format_in_either_tier(isa: str, hot: str, cold: str) -> None:
    rng = np.random.default_rng(9)
    width = 192 if "nl4" in (hot, cold) else 96
    cache = mkv.MixedKVCache(
        num_layers=1,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=width,
        hot_size=16,
        cold_size=64,
        group_size=8,
        n_pad=8,
        hot_k_type=hot,
        hot_v_type=hot,
        cold_k_type=cold,
        cold_v_type=cold,
    )
    k, v = normal(rng, 2, 40, 64), normal(rng, 2, 40, width)
    for begin in range(0, 40, 8):
        part = np.s_[:, begin : begin + 8]
        cache.append(list(range(begin, begin + 8)), [0] * 8, [k[part]], [v[part]])
    in_hot, in_cold = cache.export_rows(0, 0)
    assert len(in_hot.positions)
    assert len(in_cold.positions)
    assert len(in_hot.positions) + len(in_cold.positions) == 40
    for exported, kind, trip in (
        (in_hot, hot, lambda x: ref.stored_as(x, hot)),
        (in_cold, cold, lambda x: ref.stored_as(ref.stored_as(x, hot), cold)),
    ):
        for rows, original in ((exported.k, k), (exported.v, v)):
            assert isinstance(rows, mkv.QuantizedArray) == (kind in PACKED)
            if kind in PACKED:
                assert rows.format == kind
            at = exported.positions
            np.testing.assert_array_equal(np.asarray(rows, np.float32), trip(original[:, at]))
    q = normal(rng, 4, 1, 64)
    keys, held = cache.keys(0, 0), cache.values(0, 0)
    slot = cache.find_slot(pos=[40], seq_id=[0])
    assert slot is not None
    new_k, new_v = normal(rng, 2, 1, 64), normal(rng, 2, 1, width)
    cache.store(0, new_k, new_v)
    want, _ = ref.attention(
        q[None],
        np.concatenate([keys, ref.stored_as(new_k, hot)], 1)[None].astype(np.float64),
        np.concatenate([held, ref.stored_as(new_v, hot)], 1)[None].astype(np.float64),
    )
    packed = {*BLOCKS} & {hot, cold}
    assert relative_error(cache.attend(0, q), want[0]) <= (1e-3 if packed else F32_REL)
    cache.restore()


def test_cache_names_formats_that_it_takes() -> None:
    options: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 48}
    with pytest.raises(ValueError, match=r"cold_k_type must be 'f32', .* or 'nl3', got 'q5_0'"):
        mkv.MixedKVCache(**options, cold_k_type="q5_0")
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 32 where .* is q8_0"):
        mkv.MixedKVCache(**options, cold_k_type="q8_0", cold_v_type="q8_0")
    mkv.MixedKVCache(**options, cold_k_type="bf16", cold_v_type="bf16")
