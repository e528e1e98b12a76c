"""QuantizedArray's views and copies: whose memory they share, and what they are equal to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal
from format_cases import PACKED, values

VIEWS: dict[str, Callable[[mkv.QuantizedArray], mkv.QuantizedArray]] = {
    "all": lambda a: a,
    "strided": lambda a: a[:, ::2],
    "backwards": lambda a: a[::-1, :, ::-2],
    "transposed": lambda a: a.transpose(2, 0, 1, 3),
    "row": lambda a: a[1, 2, 3],
    "none": lambda a: a[:, :0],
    "repeated": lambda a: mkv.QuantizedArray(
        np.broadcast_to(a.numpy().data, (3, *a.data.shape)), a.format
    ),
}

COPIES: dict[str, Callable[[mkv.QuantizedArray], Any]] = {
    "copy()": lambda a: a.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    **{f"pickle {p}": lambda a, p=p: pickle.loads(pickle.dumps(a, p)) for p in range(6)},
}


@pytest.fixture(params=PACKED)
def array(request: pytest.FixtureRequest) -> mkv.QuantizedArray:
    return mkv.quantize(normal(np.random.default_rng(4), 2, 3, 5, 64), request.param)


def is_contiguous(a: mkv.QuantizedArray) -> bool:
    data: Any = a.data
    return bool(data.flags.c_contiguous if isinstance(data, np.ndarray) else data.is_contiguous())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("view", VIEWS)
def test_copies_hold_the_rows_of_a_view_side_by_side(
    array: mkv.QuantizedArray, view: str, how: str
) -> None:
    part = VIEWS[view](array)
    twin = COPIES[how](part)
    assert twin == part
    assert twin.format == array.format
    assert is_contiguous(twin)
    assert twin.data.flags.writeable
    assert not np.shares_memory(twin.data, array.data)
    np.testing.assert_array_equal(values(twin), values(part))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("view", VIEWS)
def test_copies_of_tensors_too(array: mkv.QuantizedArray, view: str, how: str) -> None:
    torch = pytest.importorskip("torch")
    part = VIEWS[view](array.torch()).torch()
    twin = COPIES[how](part)
    assert torch.is_tensor(twin.data)
    assert twin == part
    assert twin.format == array.format
    assert is_contiguous(twin)
    assert twin.data.untyped_storage().nbytes() == part.nbytes
    assert not part.nbytes or twin.data.data_ptr() != part.data.data_ptr()


def test_pickles_do_not_bring_what_a_view_does_not_show() -> None:
    big = mkv.quantize(np.zeros((100_000, 64), np.float32), "q8_0")
    assert len(pickle.dumps(big[3:5])) < 1000
    pytest.importorskip("torch")
    assert len(pickle.dumps(big.torch()[3:5])) < 2000


def test_pickles_out_of_band_copy_nothing() -> None:
    a = mkv.quantize(np.ones((4, 64), np.float32), "q4_0")
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(a, 5, buffer_callback=buffers.append)
    twin = pickle.loads(text, buffers=buffers)
    assert twin == a
    assert np.shares_memory(twin.data, a.data)


def test_views_backwards_share_memory_where_they_can(array: mkv.QuantizedArray) -> None:
    back = array[:, ::-1]
    assert back.data.strides[1] < 0
    assert np.shares_memory(back.data, array.data)
    assert np.shares_memory(back[:, ::-1].data, array.data)
    assert back[:, ::-1] == array
    q = normal(np.random.default_rng(5), 2, 3, 4, 64)
    copied = back.copy()
    np.testing.assert_array_equal(mkv.attention(q, back, back), mkv.attention(q, copied, copied))

    torch = pytest.importorskip("torch")
    t = back.torch()
    assert t == back
    assert not np.shares_memory(t.data.numpy(), array.data)
    tensor = array.torch()
    for index in (np.s_[::-1], np.s_[:, ::-1, 1], np.s_[..., 4:1:-2, :], np.s_[-3::-1]):
        assert torch.is_tensor(tensor[index].data)
        assert tensor[index] == array[index]
    assert np.shares_memory(tensor[:, ::2].data.numpy(), array.data)


def test_views_of_read_only_data_are_read_only(array: mkv.QuantizedArray) -> None:
    data = array.data.copy()
    data.flags.writeable = False
    a = mkv.QuantizedArray(data, array.format)
    views = (
        a,
        a[0],
        a[:, ::-1],
        a.numpy(),
        a.reshape(6, 5, 64),
        a.swapaxes(0, 1),
        *a,
    )
    for view in views:
        assert not view.data.flags.writeable
        with pytest.raises(ValueError, match="out must be writable"):
            mkv.quantize(np.zeros(view.shape, np.float32), a.format, out=view)
    assert a == array
    assert not a.rows().flags.writeable
    q = np.ones((2, 3, 1, 64), np.float32)
    np.testing.assert_array_equal(mkv.attention(q, a, a), mkv.attention(q, array, array))
    pytest.importorskip("torch")
    tensor = a.torch().data
    tensor.zero_()
    assert a == array


def test_equality_is_of_format_shape_and_bytes(array: mkv.QuantizedArray) -> None:
    other = array.copy()
    other.data[0, 0, 0, 0] ^= 1
    assert array != other
    assert array == array.copy()
    assert array != array.reshape(6, 5, 64)
    assert array[:, :0] == array[:, :0].copy()
    assert array[:, :0] != array[:0]
    zeros = np.zeros((3, 18), np.uint8)
    assert mkv.QuantizedArray(zeros, "q4_0") != mkv.QuantizedArray(zeros, "iq4_nl")
    with pytest.raises(TypeError, match="unhashable"):
        hash(array)


def test_equality_is_one_bool_whatever_stands_beside(array: mkv.QuantizedArray) -> None:
    torch = pytest.importorskip("torch")
    others = [
        values(array),
        values(array)[0],
        array.data,
        array.data[..., :1],
        np.float32(1),
        np.array(1),
        np.array([], object),
        torch.from_numpy(values(array)),
        array.torch().data,
        array.format,
        None,
        1,
        [],
    ]
    for one in others:
        assert (array == one) is False
        assert (one == array) is False
        assert (array != one) is True
        assert (one != array) is True
    assert (array == array.torch()) is True
    assert (array.torch() == array) is True
    assert np.equal(array, array) is True
    for options in ({"out": np.ones(2, bool)}, {"where": np.array([False])}):
        with pytest.raises(TypeError, match=f"takes no {next(iter(options))}"):
            np.equal(array, array, **options)
    assert values(array)[0] not in array
    assert array[1].copy() in array


def test_equality_of_bytes_that_are_nan() -> None:
    a = mkv.quantize(np.full((2, 64), np.nan, np.float32), "bf16")
    assert a == a.copy()
    assert np.isnan(values(a)).all()


def test_numpy_computes_with_values(array: mkv.QuantizedArray) -> None:
    x = values(array)
    np.testing.assert_array_equal(x - array, np.zeros_like(x))
    np.testing.assert_array_equal(array - x, np.zeros_like(x))
    np.testing.assert_array_equal(np.abs(array), np.abs(x))
    np.testing.assert_array_equal(np.maximum.reduce(array), x.max(0))
    np.testing.assert_array_equal(array < x + 1, np.ones_like(x, bool))
    out = np.empty_like(x)
    assert np.add(array, 1, out=out) is out
    np.testing.assert_array_equal(out, x + 1)
    before = array.copy()
    with pytest.raises(TypeError):
        np.add(x, x, out=array)
    assert array == before


@pytest.mark.parametrize(("start", "stride"), [(0, 130), (1, 130), (0, 129), (1, 129)])
def test_bf16_rows_that_are_not_aligned_are_copied(start: int, stride: int) -> None:
    """Bytes may begin anywhere; the core reads bf16 in twos."""
    rng = np.random.default_rng(6)
    memory = mkv.quantize(normal(rng, 8, 64), "bf16").data.reshape(-1)
    data = np.lib.stride_tricks.as_strided(memory[start:], (1, 5, 128), (0, stride, 1))
    a = mkv.QuantizedArray(data, "bf16")
    assert np.shares_memory(a.rows(), memory) == (start % 2 == stride % 2 == 0)
    q = normal(rng, 1, 2, 64)
    np.testing.assert_array_equal(mkv.attention(q, a, a), mkv.attention(q, a.copy(), a.copy()))
