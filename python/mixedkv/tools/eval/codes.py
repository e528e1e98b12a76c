"""What quantising does to rows, in plain torch: an independent word on the formats.

Nothing of mixedkv's kernels is called here. Values go in and come back as the cold tier would
give them to attention: quantised and dequantised.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

Q4_0 = tuple(float(level) for level in range(-8, 8))
IQ4_NL = tuple(
    float(level)
    for level in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)
NL4 = tuple(
    float(level)
    for level in (-111, -88, -70, -55, -41, -28, -16, -5, 6, 17, 29, 42, 56, 73, 94, 127)
)
NL3 = tuple(float(level) for level in (-104, -65, -34, -8, 17, 44, 76, 127))

MANY = tuple(0.8 + 0.05 * step for step in range(9))
FEW = tuple(0.86 + 0.07 * step for step in range(5))
"""Factors of the scale that a search tries, each with both signs."""
FITTED = (151, 143, 137, 130, 125, 120, 115, 111, 107)
"""Bytes that a block's largest magnitude becomes where ggml's formats are fitted, likewise."""


@dataclass(frozen=True)
class Code:
    """A format whose values are ``d * level``, d an f16 number of each block.

    Attributes
    ----------
    block
        Values that share d.
    levels
        What a value may be, ascending; bits: log2 of how many.
    factors
        Of a format without a rule: scales that its search tries, over the one that suits Gaussian
        values best.
    rule
        Gives d (f32) and the levels chosen for blocks [n, block] where no search is asked for;
        None: there is no other way than the search.
    step
        A level's unit in the bytes that a search for another scale than the rule's works with.
    """

    block: int
    levels: tuple[float, ...]
    factors: tuple[float, ...]
    rule: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    step: int = 1

    @property
    def bits(self) -> float:
        """Bits of a value, its share of the block's scale included."""
        return math.log2(len(self.levels)) + 16 / self.block


def quantised(rows: torch.Tensor, kind: str, *, least_error: bool = False) -> torch.Tensor:
    """Quantise and dequantise rows.

    Parameters
    ----------
    rows
        f32 [..., head_dim], whole blocks.
    kind
        A type of keys or values: "f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl", "nl4", "nl3".
    least_error
        Choose each block's scale by its squared error, where the format has another rule.
        q8_0 has one rule.

    Returns
    -------
    torch.Tensor
        f32, of the shape of `rows`.
    """
    if kind == "f32":
        return rows
    if kind in ("f16", "bf16"):
        return rows.to(torch.float16 if kind == "f16" else torch.bfloat16).float()
    if kind == "q8_0":
        blocks = rows.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        return (_half(scale) * _away(blocks * _inverse(scale))).reshape(rows.shape)
    code = CODES[kind]
    blocks = rows.reshape(-1, code.block)
    if code.rule is None:
        scale, levels = _searched(blocks, code)
        return (_half(scale) * levels).reshape(rows.shape)
    scale, levels = code.rule(blocks)
    values = _half(scale) * levels
    if least_error:
        scale, levels = _fitted(blocks, code)
        found = _half(scale) * levels
        errors = [(of.double() - blocks).square().sum(1, keepdim=True) for of in (values, found)]
        values = torch.where(errors[1] * (1 + 2**-17) < errors[0], found, values)
    return values.reshape(rows.shape)


def bits(kind: str) -> float:
    """Give the bits of a value, scales included."""
    plain = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
    return plain[kind] if kind in plain else CODES[kind].bits


def hadamard(size: int) -> torch.Tensor:
    """Give the rotation of rows of `size` values, [size, size], symmetric and its own inverse.

    A normalised Hadamard matrix over each run of 2**k values, the longest that divides `size`.
    """
    run = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < run:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotation: torch.Tensor = torch.block_diag(*[matrix / math.sqrt(run)] * (size // run))
    return rotation


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _away(values: torch.Tensor) -> torch.Tensor:
    """Round to whole numbers, halves away from zero, as C's roundf does."""
    return torch.copysign(torch.floor(values.abs() + 0.5), values)


def _signed_largest(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _signed_largest(blocks) / -8
    steps = torch.floor(blocks * _inverse(scale) + 8.5).clamp(max=15)
    return scale, steps - 8


def _iq4_nl(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # ggml's quantize_row_iq4_nl_ref: the largest value on the first level, then the scale that
    # fits the levels so chosen best, errors weighted by the values' squares.
    scale = _signed_largest(blocks) / IQ4_NL[0]
    levels = _nearest(blocks * _inverse(scale), IQ4_NL)
    weights = blocks * blocks
    over = (weights * levels * levels).sum(1, keepdim=True)
    fitted = (weights * levels * blocks).sum(1, keepdim=True) * _inverse(over)
    return fitted, levels


def _nearest(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    table, borders = _tables(levels)
    return table[torch.bucketize(values.contiguous(), borders)]


@cache
def _tables(levels: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(levels)
    return table, (table[1:] + table[:-1]) / 2


def _searched(blocks: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the scale and levels of least squared error among all that the factors lead to."""
    start = blocks.square().mean(1, keepdim=True).sqrt() / _gaussian_deviation(code.levels)
    tried = torch.tensor([sign * factor for factor in code.factors for sign in (1.0, -1.0)])
    levels = _nearest(blocks * _inverse(start * tried[:, None, None]), code.levels)
    products, norms = (blocks * levels).sum(2), levels.square().sum(2)
    # The best d for some levels is product / norm; it explains product^2 / norm of the square.
    best = (products.square() * _inverse(norms)).argmax(0)
    index = torch.arange(len(blocks))
    scale = (products * _inverse(norms))[best, index]
    return scale[:, None], levels[best, index]


def _fitted(blocks: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the scale and levels that `fit_scales` tries beside the rule's: docs/formats.md."""
    largest = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0.0, 32767 / largest)
    whole = torch.round(blocks * inverse).double()  # halves to even; all below is exact in f64
    wide = tuple(level * code.step for level in code.levels)
    most = torch.full_like(largest, -1.0)
    scale, levels = torch.zeros_like(largest), torch.zeros_like(blocks)
    for multiplier in (sign * size for size in FITTED for sign in (1, -1)):
        bytes_ = torch.floor((whole * multiplier + 16384) / 32768).clamp(-128, 127)
        tried = _nearest(bytes_.float(), wide)
        products = (whole * tried).sum(1, keepdim=True).float()
        norms = tried.square().sum(1, keepdim=True)
        score = products * products / norms
        better = score > most
        most = torch.where(better, score, most)
        scale = torch.where(better, products / norms, scale)
        levels = torch.where(better, tried / code.step, levels)
    return scale * (largest / 32767 * code.step), levels


@cache
def _gaussian_deviation(levels: tuple[float, ...]) -> float:
    """Give the deviation at which Gaussian values lose least by going to these levels."""
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    values = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    spread = max(abs(level) for level in levels)
    deviations = [spread * share / 400 for share in range(80, 320)]

    def loss(deviation: float) -> float:
        scaled = (values * deviation).float()
        return float((scaled - _nearest(scaled, levels)).square().mean()) / deviation**2

    return min(deviations, key=loss)


CODES = {
    "q4_0": Code(32, Q4_0, (), _q4_0, step=16),
    "iq4_nl": Code(32, IQ4_NL, (), _iq4_nl),
    "nl4": Code(64, NL4, MANY, None),
    "nl3": Code(32, NL3, FEW, None),
}
