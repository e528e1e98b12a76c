"""Formats of rows: their table, and their bytes bit for bit."""

from __future__ import annotations

import ctypes

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from conftest import normal
from format_cases import (
    BLOCKS,
    DATA,
    GGML_BLOCKS,
    OWN,
    PACKED,
    whole_blocks,
)

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
