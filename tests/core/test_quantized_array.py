"""QuantizedArray: a view of rows of bytes, indexed and told apart like an array of values."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal
from format_cases import (
    BLOCKS,
    OWN,
    PACKED,
    values,
)

TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(params=PACKED)
def array(request: pytest.FixtureRequest) -> mkv.QuantizedArray:
    return mkv.quantize(normal(np.random.default_rng(4), 2, 3, 5, 64), request.param)


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
        np.s_[::-1, ::-2, 3:0:-2],
        np.s_[None, ::-1, [2, 0, 2], ::-1],
        np.s_[::-1, np.array([2, 0])[::-1]],
        np.s_[:, 2:0:-1, None, ::-1, :],
        np.s_[0:1:-1, ..., :],
        np.s_[np.array([[True, False, True], [False, True, True]]), ::-1],
        np.s_[[[True, False, True], [False, True, True]], ::2],
        np.s_[[True, False], ..., [True, False, True, True, False], :],
        np.s_[[], 1],
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
    pytest.importorskip("torch")
    np.testing.assert_array_equal(values(array.torch()[index]), want)


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
    for rows in (array, array.torch()) if TORCH else (array,):
        for shape in ((2, 3, 5 * 64), (2, 3, 10, 32), (2, 3, -1), ()):
            with pytest.raises(ValueError, match="last axis"):
                rows.reshape(shape)
        for shape in ((7, 64), (-2, 15, 64), (-1, -1, 64), (0, -1, 64), (10**40, 64), (-1, 7, 64)):
            with pytest.raises(ValueError, match=rf"\(2, 3, 5, 64\) can't be .* \({shape[0]}, "):
                rows.reshape(shape)
        for wrong in (2.0, "x", None, True, np.float32(2)):
            got = f"must be an int, got {type(wrong).__name__}"
            with pytest.raises(TypeError, match=f"shape {got}"):
                rows.reshape(wrong, 3, 5, 64)
            with pytest.raises(TypeError, match=f"axis {got}"):
                rows.swapaxes(wrong, 1)
            with pytest.raises(TypeError, match=f"axes {got}"):
                rows.transpose(wrong, 1, 2, 3)
    for axes in ((3, 0, 1, 2), (0, 1, 2), (0, 0, 1, 3)):
        with pytest.raises(ValueError, match="the last one last"):
            array.transpose(*axes)
    with pytest.raises(ValueError, match="the last one last"):
        array.swapaxes(0, 3)
    with pytest.raises(ValueError, match="axis 4 is out of range"):
        array.swapaxes(0, 4)


def test_quantized_array_as_numpy(array: mkv.QuantizedArray) -> None:
    x = array.dequantize()
    assert np.asarray(array).dtype == np.float32
    assert np.asarray(array, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.array(array, np.float16), x.astype(np.float16))
    np.testing.assert_array_equal(np.add(array, 1), x + 1)
    assert np.asarray(array, dtype=np.int32).dtype == np.int32
    assert not np.shares_memory(np.array(array, copy=True), np.asarray(array, copy=None))
    for refuses in (
        lambda: array.__array__(copy=False),
        lambda: np.asarray(array, copy=False),
        lambda: np.array(array, np.float64, copy=False),
    ):
        with pytest.raises(ValueError, match="can't be had without a copy"):
            refuses()
    with pytest.raises(TypeError, match="nosuch"):
        np.asarray(array, "nosuch")


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


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["int", "uint"])
def test_quantized_array_takes_integers_of_every_width(kind: str, bits: int) -> None:
    """Numbers of rows, also where torch by itself takes uint8 for a mask."""
    torch = pytest.importorskip("torch")
    array = mkv.quantize(normal(np.random.default_rng(3), 4, 2, 32), "q8_0")
    index = np.array([0, 1, 1, 3], f"{kind}{bits}")
    tensor = torch.from_numpy(index)
    want = values(array)[[0, 1, 1, 3]]
    for rows in (array, array.torch()):
        for places in (index, list(index), tensor):
            np.testing.assert_array_equal(values(rows[places]), want)
    assert array.torch()[[]].shape == array[[]].shape == (0, 2, 32)


def test_quantized_array_of_torch_rows_of_one_value() -> None:
    """A stride that no second value shows is no reason to refuse."""
    torch = pytest.importorskip("torch")
    t = torch.randn(4, 8).bfloat16()
    for rows in (t[:, ::8], t[:1, ::8]):
        array = mkv.QuantizedArray(rows, "bf16")
        np.testing.assert_array_equal(array.dequantize(np.float32), rows.float().numpy())


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
