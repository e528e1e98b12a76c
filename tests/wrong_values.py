"""Wrong values of every parameter that the library's signatures have, by the parameter's name.

A test goes over a signature and asks here for each of its parameters: one that is new and has no
wrong values yet fails there, so that none is forgotten.
"""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

WRONG = (ValueError, TypeError, NotImplementedError)
NAN = float("nan")
INF = float("inf")


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


# --- kinds ------------------------------------------------------------------------------------

NO_NUMBER: list[Any] = ["1", b"1", "", True, np.True_, 1j, [1.0], {}, np.float32]
NO_NUMBER += [zeros(1), zeros(2)]
NO_INT: list[Any] = [
    *("1", "", 1.0, 1.5, np.float32(1), NAN, INF, True, np.True_, 1j, [1], zeros(1, dtype=np.int64))
]
NO_SWITCH: list[Any] = [None, 0, 1, "yes", "", NAN, [], [True], np.int8(1)]
NO_SWITCH += [np.array([True]), np.array([True, False])]
NO_WORD: list[Any] = [0, 1, True, NAN, b"f32", ["f32"], "", "F32", "nosuch", np.float32, zeros(2)]
NO_ARRAY: list[Any] = ["x", 1, NAN, True, [], [[1.0]], {}, object(), np.float32(1)]

REAL = [*NO_NUMBER, NAN, INF, -INF, 1e300, -1e39, 10**400]
COUNT = [*NO_INT, None, 0, -1, -(2**70), 2**31, 2**41, 2**70]
LENGTH = [*NO_INT, None, -1, 33]
EXTENT = [x for x in COUNT if x is None or x != 0]
PINS = [*NO_INT, None, -1, 10**6, 2**31, 2**70, -(2**70)]
WINDOW = [*NO_INT, -2, -(2**70), 2**41, 2**70]
PER_HEAD = [*NO_ARRAY, zeros(1), zeros(1000), zeros(1, 4), zeros(4, dtype=np.float64)]
PER_HEAD += [zeros(4, dtype=np.int32), zeros(4, dtype=bool), np.array(1, np.float32)]
ROWS = [*NO_ARRAY, None, zeros(), zeros(3), zeros(2, 2, 2, 2, 2, 2), zeros(4, 4, 32, dtype=float)]
ROWS += [zeros(4, 4, 32, dtype=kind) for kind in (np.int8, np.int32, bool, complex, object, ">f4")]
INDICES: list[Any] = [
    *("x", 1, NAN, True, {}, None, object(), [NAN], [1.5], ["1"], [None], [2**70])
]
INDICES += [[[0]], zeros(3), zeros(3, 1, dtype=np.int64), zeros(3, dtype=bool), np.array(1)]
LAYERS: list[Any] = ["0", 1, NAN, True, {"a": 1}, [], [True], [1.0], [-1], [10**6], [2**70]]
LAYERS += [zeros(1)]
FORMAT = [*NO_WORD, None, "Q4_0", "q5_0", "float16"]

OF_KIND: dict[str, list[Any]] = {
    **dict.fromkeys(("q", "k", "v", "kv_pages", "x", "b", "data"), ROWS),
    **dict.fromkeys(("out_a", "out_b", "lse_a", "lse_b", "outs", "lses"), ROWS),
    **dict.fromkeys(("alibi_slopes", "sinks"), PER_HEAD),
    **dict.fromkeys(("window_left", "window_right"), WINDOW),
    **dict.fromkeys(("indptr", "indices", "last_page_len", "pos"), INDICES),
    **dict.fromkeys(("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "n_seq_max"), COUNT),
    **dict.fromkeys(("num_qo_heads", "hot_size", "cold_size", "n_pad", "size"), COUNT),
    **dict.fromkeys(("qo_len", "batch"), EXTENT),
    **dict.fromkeys(("sink_tokens", "hot_keep"), PINS),
    **dict.fromkeys(("hot_k_type", "hot_v_type", "cold_k_type", "cold_v_type"), FORMAT),
    **dict.fromkeys(("k_type", "v_type", "format"), FORMAT),
    **dict.fromkeys(("causal", "return_lse", "rotate", "center_keys", "quantize"), NO_SWITCH),
    **dict.fromkeys(("dequantize", "allow_non_finite", "record_history", "fit_scales"), NO_SWITCH),
    "group_size": [x for x in COUNT if x != 2**31],
    "sm_scale": REAL,
    "logits_soft_cap": [*REAL, None, -1.0, -1e-30, 1e-46, 1e-40],
    "threshold": [*REAL, None, -0.5, 1.5],
    "threads": [*NO_INT, 0, -1, 1025, 2**70],
    "compute_type": [*NO_WORD, None, "f16", "BF16"],
    "layout": [*NO_WORD, None, "BHND", "hnd"],
    "preset": [x for x in NO_WORD if x is not None],
    "name": [*NO_WORD, None],
    "mask": [*NO_ARRAY, zeros(1000, 1000), zeros(1, 1, 1, 1, 1), zeros(1, dtype=float)],
    "out": [*NO_ARRAY, zeros(), zeros(7, 7), zeros(1, 1, 1, 1, 1, 1)],
    "qo_indptr": [x for x in INDICES if x is not None],
    **dict.fromkeys(("n", "num_bytes"), LENGTH),
    "layer": [*NO_INT, None, -1, 10**6, 2**32, 2**70, -(2**70)],
    "seq": [*NO_INT, None, -1, 10**6, 2**32, 2**70, -(2**70)],
    "max_batch_size": [x for x in COUNT if x is not None],
    "layer_filter": LAYERS,
    "rope": [1, "x", NAN, True, {}, zeros(2)],
    "q_start": [*NO_INT, -(2**70), 2**41, 2**70],
    "kv_start": [*NO_INT, -(2**70), 2**41, 2**70],
    "dtype": ["x", 1, NAN, np.float64, np.int8, bool, "uint8", object, zeros(2)],
}
"""What none of them takes, wherever it stands; None is left out where it means the default."""

NONE_IS_DEFAULT = {"head_dim_v", "max_batch_size"}


def cases(
    function: Callable[..., Any], *, without: Iterable[str] = ()
) -> Iterable[tuple[str, Any]]:
    """Give (parameter, wrong value) for all of a signature."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name in without or name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert name in OF_KIND, f"{function.__qualname__} has {name}: say what it must not be"
        for value in OF_KIND[name]:
            if value is None and (parameter.default is None or name in NONE_IS_DEFAULT):
                continue
            yield name, value


def label(value: Any) -> str:
    """A short and unambiguous id."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {reprlib.repr(value)[:30]}"


def check_refused(call: Callable[[], Any], name: str, value: Any, *, named: str = "") -> None:
    """Fail unless a call is refused by the argument's name (or another, `named`) and its value."""
    try:
        got = call()
    except WRONG as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}={label(value)} was taken: {got!r}")
    found = re.search(rf"(?<![A-Za-z0-9_])({named or name})(?![A-Za-z0-9_])", message)
    assert found, f"{name}={label(value)} is not named: {message}"
    told = message
    if not isinstance(value, np.ndarray):  # whose shape may be what others have to have
        told = message.rpartition("got ")[2]  # all of it, where there is no such word
        told += " ".join(re.findall(rf"{name} \(.*?\)|{name}=[^ ,]*", message))
    assert any(text in told for text in _texts(value)), (
        f"{name}: its value {label(value)} is not told: {message}"
    )


def _texts(value: Any) -> list[str]:
    """What a message may say of a value: itself, or of what is no scalar its type or shape."""
    if isinstance(value, np.ndarray):
        # A scalar, as messages call an array without axes.
        texts = [str(value.dtype), str(value.shape), type(value).__name__, *map(str, value.shape)]
        texts += [str(value), f"axes, got {value.ndim}"]
        return texts if value.ndim else [*texts, "a scalar"]
    texts = [repr(value), reprlib.repr(value), str(value) or repr(value)]
    if isinstance(value, (list, dict)):
        texts += [*map(repr, value), type(value).__name__, f"{len(value)} of them"]
        texts += [] if value else ["none"]
    if isinstance(value, np.generic):
        texts.append(f"shape {value.shape}")
    if value is None or type(value) is object:
        texts.append(type(value).__name__)
    return texts
