"""nl4 and nl3: what holds for every block, tried on blocks that hypothesis thinks up.

Bounds are derived from the levels and the search that docs/formats.md describes, not measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mixedkv as mkv
import numpy as np
import pytest
import reference as ref
from reference import formats as formulas

pytest.importorskip("hypothesis")

from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

OVERFLOW = {"nl4": 4_193_280.0, "nl3": 2_096_640.0}
#: How much of itself a magnitude may grow by (include/mixedkv/formats.h).
GROWTH = {"nl4": 1.0, "nl3": 2.0}
HALF_SUBNORMAL = 2.0**-25


class Code(NamedTuple):
    """A format: its name, values of a block, levels, and the multipliers of its search."""

    name: str
    size: int
    levels: np.ndarray
    multipliers: tuple[int, ...]


CODES = [
    Code("nl4", 64, np.array(formulas.NL4_LEVELS), formulas.NL4_MULTIPLIERS),
    Code("nl3", 32, np.array(formulas.NL3_LEVELS), formulas.NL3_MULTIPLIERS),
]


@pytest.fixture(params=CODES, ids=lambda code: code.name)
def code(request: pytest.FixtureRequest) -> Code:
    found: Code = request.param
    return found


# --- blocks -----------------------------------------------------------------------------------


def scaled(x: np.ndarray, exponent: int) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(x.astype(np.float64), exponent).astype(np.float32)


@st.composite
def shapes_of_blocks(draw: Any, code: Code) -> np.ndarray:
    """A block of magnitudes up to 1: any values, few ones, levels, and what lies between levels."""
    unit = st.floats(-1, 1, width=32)
    kind = draw(st.sampled_from(["any", "heavy", "levels", "borders", "equal", "normal"]))
    if kind == "any":
        return draw(hnp.arrays(np.float32, code.size, elements=unit))
    if kind == "equal":
        return np.full(code.size, draw(unit), np.float32)
    if kind == "normal":
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        x = rng.standard_normal(code.size)
        return (x / np.abs(x).max()).astype(np.float32)
    if kind == "heavy":
        x = np.full(code.size, draw(unit) * 2.0 ** -draw(st.integers(0, 12)), np.float32)
        x[draw(st.integers(0, code.size - 1))] = draw(unit)
        return x
    steps = code.levels / 127
    if kind == "borders":
        steps = (steps[1:] + steps[:-1]) / 2
    x = steps[draw(hnp.arrays(np.int64, code.size, elements=st.integers(0, len(steps) - 1)))]
    x[draw(st.integers(0, code.size - 1))] = draw(st.sampled_from([1.0, -1.0, -127 / 128]))
    return (x * draw(st.sampled_from([1.0, -1.0, 1 - 2**-20]))).astype(np.float32)


def blocks_of(code: Code, low: int = -40, high: int = 20) -> st.SearchStrategy[np.ndarray]:
    """Blocks of values below 2**high in magnitude, exponents from low on."""
    return st.builds(scaled, shapes_of_blocks(code), st.integers(low, high))


def trip(code: Code, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """What a block reads back as, its numbers of levels, and d, from the block's own bytes."""
    a = mkv.quantize(x, code.name)
    d = float(a.data[:2].copy().view(np.float16)[0])
    qs = a.data[2:]
    if code.name == "nl3":
        rest = (qs.reshape(3, 4) >> 3 & 0x11) << np.arange(3, dtype=np.uint8)[:, None]
        qs = np.r_[qs & 0x77, rest.sum(0).astype(np.uint8)]
    of = qs.reshape(-1, 16)
    numbers = np.stack([of & 15, of >> 4], 1).reshape(-1)
    return np.asarray(a), numbers, d


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


# --- bytes ------------------------------------------------------------------------------------


def test_bytes_and_values_are_those_of_the_description(isa: str, code: Code) -> None:
    pack, unpack = ref.PACKED[code.name]

    @given(blocks_of(code, -160, 127))
    def check(x: np.ndarray) -> None:
        got = mkv.quantize(x, code.name, allow_non_finite=True)
        np.testing.assert_array_equal(got.data, pack(x))
        np.testing.assert_array_equal(np.asarray(got), unpack(got.data))

    check()


def test_every_byte_string_is_a_block(isa: str, code: Code) -> None:
    """Its values are levels times d, none of them finite where d is not."""
    nbytes = mkv.formats.info(code.name).block_bytes

    @given(hnp.arrays(np.uint8, nbytes))
    def check(data: np.ndarray) -> None:
        got = np.asarray(mkv.QuantizedArray(data, code.name))
        np.testing.assert_array_equal(got, ref.PACKED[code.name][1](data))
        d = float(data[:2].copy().view(np.float16)[0])
        if np.isfinite(d):
            assert set(got.astype(np.float64)) <= {float(level) * d for level in code.levels}
        else:
            assert not np.isfinite(got).any()

    check()


# --- errors -----------------------------------------------------------------------------------


def error_bound(code: Code, x: np.ndarray, d: float, numbers: np.ndarray) -> float:
    """The most that a round trip's error may be, by norm.

    The search takes the candidate whose levels, by the scale that suits them best, have the least
    squared error. A candidate m takes for each value the level nearest to m x / a: its error is at
    most that of m's own scale, a / m. Rounding m x / a to bytes first can pick a level that is
    farther away by one step at most, and a little for the integers X. What is left is d's rounding
    to f16, and that of the scores to f32.
    """
    x = x.astype(np.float64)
    a = np.abs(x).max()
    if a == 0:
        return 0.0
    best = np.inf
    for m in (sign * one for one in code.multipliers for sign in (1, -1)):
        away = np.abs(x[:, None] * (m / a) - code.levels).min(1)
        best = min(best, a / abs(m) * (norm(away) + 1.01 * np.sqrt(code.size)))
    of_scores = norm(x) * 2.0**-10
    of_d = max(abs(d) * 2.0**-11, HALF_SUBNORMAL) * norm(code.levels[numbers])
    return float(np.hypot(best, of_scores) + of_d)


def test_round_trip_error_is_that_of_the_best_candidate(isa: str, code: Code) -> None:
    @given(blocks_of(code))
    def check(x: np.ndarray) -> None:
        got, numbers, d = trip(code, x)
        assert norm(got - x) <= error_bound(code, x, d, numbers)

    check()


def test_round_trip_error_is_bounded_by_the_largest_value(isa: str, code: Code) -> None:
    """By half the widest gap between levels, and a step for rounding to bytes, in units of a / 127.

    Of a block with one large value beside small ones that is next to nothing of its norm.
    """
    reach = max(np.diff(code.levels).max() / 2, 127 + code.levels.min()) + 1.01

    @given(blocks_of(code))
    def check(x: np.ndarray) -> None:
        got, numbers, d = trip(code, x)
        a = float(np.abs(x).max())
        of_d = max(abs(d) * 2.0**-11, HALF_SUBNORMAL) * norm(code.levels[numbers])
        bound = np.sqrt(code.size) * a / 127 * reach
        assert norm(got - x) <= np.hypot(bound, norm(x) * 2.0**-10) + of_d

    check()


def test_d_is_the_best_scale_of_the_levels_chosen(isa: str, code: Code) -> None:
    """d = <x, c> / <c, c>, but for the integers that x is rounded to, f32 and f16."""

    @given(blocks_of(code))
    def check(x: np.ndarray) -> None:
        _, numbers, d = trip(code, x)
        c = code.levels[numbers].astype(np.float64)
        exact = float(x.astype(np.float64) @ c / (c @ c))
        a = float(np.abs(x).max())
        of_integers = a / 32767 * 0.51 * np.abs(c).sum() / (c @ c)
        of_rounding = max(abs(exact) * (2.0**-11 + 2.0**-20), HALF_SUBNORMAL)
        assert abs(d - exact) <= of_integers * 1.01 + of_rounding

    check()


# --- again, and scaled ------------------------------------------------------------------------


def ended(numbers: np.ndarray, code: Code, end: int, at: int) -> np.ndarray:
    """Numbers of levels whose largest magnitude is that of one end of them, there and elsewhere."""
    numbers = numbers.copy()
    if end == 0:
        numbers[numbers == len(code.levels) - 1] = 0
    numbers[at] = end
    return numbers


def check_found_again(code: Code, x: np.ndarray, numbers: np.ndarray, *, surely: bool) -> None:
    """A candidate finds such levels again, without an error but for roundings.

    Another may come to as much, to f32, with other levels that are as good as proportional: that is
    so of blocks of nearly one value. Else (`surely`), and whenever levels are the same, so is d.
    """
    once, found, d = trip(code, x)
    of_d = max(abs(d) * 2.0**-11, HALF_SUBNORMAL) * norm(code.levels[found])
    assert norm(once - x) <= norm(x) * 2.0**-10 + of_d
    if surely or np.array_equal(found, numbers):
        np.testing.assert_array_equal(once, x)


def test_blocks_that_reach_an_end_of_the_levels_come_back(isa: str, code: Code) -> None:
    ends = st.sampled_from([0, len(code.levels) - 1])
    numbers_of = hnp.arrays(np.int64, code.size, elements=st.integers(0, len(code.levels) - 1))
    most = 2.0 ** np.floor(np.log2(OVERFLOW[code.name] / 127))
    scale = st.floats(2.0**-24, most, width=16)

    @given(numbers_of, ends, st.integers(0, code.size - 1), scale, st.sampled_from([1, -1]))
    def check(numbers: np.ndarray, end: int, at: int, d: float, sign: int) -> None:
        numbers = ended(numbers, code, end, at)
        x = (code.levels[numbers] * np.float32(d) * sign).astype(np.float32)
        check_found_again(code, x, numbers, surely=False)

    check()


def test_most_blocks_are_what_they_come_back_as(isa: str, code: Code) -> None:
    rng = np.random.default_rng(12)
    for end in (0, len(code.levels) - 1):
        for d in (np.float32(2.0**-24), np.float32(-0.0371), np.float32(1000)):
            numbers = ended(rng.integers(0, len(code.levels), code.size), code, end, 3)
            x = (code.levels[numbers] * np.float16(d).astype(np.float32)).astype(np.float32)
            check_found_again(code, x, numbers, surely=True)


def test_a_second_trip_loses_no_more_than_a_first(isa: str, code: Code) -> None:
    @given(blocks_of(code, -10, 20))
    def check(x: np.ndarray) -> None:
        once, numbers, _ = trip(code, x)
        again, more_numbers, d = trip(code, once)
        assert norm(again - once) <= error_bound(code, once, d, more_numbers)
        if np.abs(code.levels[numbers]).max() in (127, -code.levels.min()):
            check_found_again(code, once, numbers, surely=False)

    check()


def test_powers_of_two_change_d_alone(isa: str, code: Code) -> None:
    @given(shapes_of_blocks(code), st.integers(-3, 17))
    def check(x: np.ndarray, exponent: int) -> None:
        assume(np.abs(x).max() == 0 or np.abs(x).max() >= 0.5)
        one, numbers, d = trip(code, x)
        other, other_numbers, other_d = trip(code, scaled(x, exponent))
        np.testing.assert_array_equal(numbers, other_numbers)
        if abs(d) > 2.0**-11:  # both are normal numbers
            assert other_d == d * 2.0**exponent
            np.testing.assert_array_equal(other, scaled(one, exponent))

    check()


def test_f16_values_have_the_bytes_of_the_same_in_f32(isa: str, code: Code) -> None:
    @given(blocks_of(code, -20, 15))
    def check(x: np.ndarray) -> None:
        half = x.astype(np.float16)
        assert mkv.quantize(half, code.name) == mkv.quantize(half.astype(np.float32), code.name)

    check()


# --- magnitudes -------------------------------------------------------------------------------


def test_what_is_below_the_limit_stays_finite(isa: str, code: Code) -> None:
    """Whatever else is in the block, up to the last float below; from there on it is refused."""
    limit = np.float32(mkv.formats.info(code.name).overflow or 0)
    assert limit == OVERFLOW[code.name]
    below = np.nextafter(limit, np.float32(0))

    @given(shapes_of_blocks(code), st.integers(0, code.size - 1), st.sampled_from([1, -1]))
    def check(x: np.ndarray, at: int, sign: int) -> None:
        x = x * below
        x[at] = sign * below
        got, _, d = trip(code, x)
        assert np.isfinite(d)
        assert np.isfinite(got).all()
        x[at] = sign * limit
        words = f"x must have magnitudes below {limit:.9g} for {code.name}, got x["
        with pytest.raises(ValueError, match=words.replace("[", r"\[")):
            mkv.quantize(x, code.name)

    check()


def test_magnitudes_grow_by_no_more_than_the_table_says(isa: str, code: Code) -> None:
    """That is what lets a cache know at store that a cold tier will hold what hot has stored."""

    @given(blocks_of(code))
    def check(x: np.ndarray) -> None:
        got, _, _ = trip(code, x)
        a = float(np.abs(x).max())
        assert np.abs(got).max() <= (1 + GROWTH[code.name]) * a + 128 * HALF_SUBNORMAL

    check()


def test_what_is_not_finite_takes_its_block_alone(isa: str, code: Code) -> None:
    bad = st.sampled_from([np.nan, np.inf, -np.inf])

    @given(blocks_of(code), blocks_of(code), st.integers(0, code.size - 1), bad)
    def check(x: np.ndarray, beside: np.ndarray, at: int, value: float) -> None:
        want = mkv.quantize(beside, code.name)
        x = x.copy()
        x[at] = value
        both = mkv.quantize(np.r_[x, beside], code.name, allow_non_finite=True)
        got = np.asarray(both)
        assert np.isnan(got[: code.size]).all()
        np.testing.assert_array_equal(both.data[len(want.data) :], want.data)

    check()
