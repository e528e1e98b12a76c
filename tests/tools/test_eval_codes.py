"""The simulation's formats, against mixedkv's own bytes and against definitions."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mixedkv as mkv  # noqa: E402
from mixedkv.tools.eval import codes  # noqa: E402


def rows(count: int = 200, width: int = 64) -> np.ndarray:
    """Rows as unlike as f16 keys are: Gaussian ones of many sizes, an outlier, ties, zeros."""
    random = np.random.default_rng(5)
    values = random.standard_normal((count, width)) * np.exp(random.uniform(-6, 6, (count, 1)))
    values[3] = 0.0
    values[4, 7] = 300.0
    values[5] = np.where(np.arange(width) % 2, 1.5, -1.5)
    values[6] = 0.25
    return values.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "iq4_nl"])
def test_values_are_those_of_the_bytes(kind: str) -> None:
    values = rows()
    found = codes.quantised(torch.from_numpy(values), kind)
    np.testing.assert_array_equal(found.numpy(), mkv.quantize(values, kind).dequantize())


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
def test_fitted_values_are_those_of_the_bytes(kind: str) -> None:
    values = rows(2000)
    found = codes.quantised(torch.from_numpy(values), kind, least_error=True)
    wanted = mkv.quantize(values, kind, fit_scales=True).dequantize()
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert (found.numpy() != mkv.quantize(values, kind).dequantize()).any(1).mean() > 0.9


@pytest.mark.parametrize("kind", list(codes.CODES))
def test_least_error_is_no_more(kind: str) -> None:
    values = torch.from_numpy(rows())
    found = codes.quantised(values, kind, least_error=True)
    code = codes.CODES[kind]

    def loss(of: torch.Tensor) -> torch.Tensor:
        return (of - values).square().reshape(-1, code.block).sum(1)

    if code.rule is not None:
        assert loss(found).sum() < loss(codes.quantised(values, kind)).sum()
    # Every block holds one f16 scale times levels.
    for block, of in zip(found.reshape(-1, code.block), loss(found), strict=True):
        scales = [float(block[block.abs().argmax()]) / level for level in code.levels if level]
        fits = any(
            torch.isclose(
                block / scale, codes._nearest(block / scale, code.levels), atol=0.02
            ).all()
            for scale in scales
            if scale
        )
        assert fits or not block.any()
        assert of >= 0


def test_losses_of_gaussian_rows() -> None:
    """More levels lose less; the figures are those of the formats' bits, roughly 6 dB each."""
    values = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))

    def loss(kind: str, least_error: bool = True) -> float:
        found = codes.quantised(values, kind, least_error=least_error)
        return float((found - values).square().mean().sqrt())

    assert loss("q8_0") < 0.01
    assert loss("iq4_nl") < loss("iq4_nl", False) < loss("q4_0", False)
    assert loss("q4_0") < loss("q4_0", False)
    assert loss("iq4_nl") < loss("nl4") < 1.15 * loss("iq4_nl")
    assert 1.5 * loss("nl4") < loss("nl3") < 0.2
    # Lloyd-Max for 8 levels and one scale for all loses 0.0345 of a Gaussian's square.
    assert 0.02 < loss("nl3") ** 2 < 0.0345
    # 16 levels: 0.0095.
    assert 0.005 < loss("nl4") ** 2 < 0.0095


def test_bits() -> None:
    assert {kind: codes.bits(kind) for kind in ("f16", "q8_0", "q4_0", "iq4_nl", "nl4", "nl3")} == {
        "f16": 16,
        "q8_0": 8.5,
        "q4_0": 4.5,
        "iq4_nl": 4.5,
        "nl4": 4.25,
        "nl3": 3.5,
    }


@pytest.mark.parametrize("size", [1, 2, 64, 80, 96, 256])
def test_hadamard(size: int) -> None:
    matrix = codes.hadamard(size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-5)
    run = size & -size
    first = matrix[0]
    torch.testing.assert_close(first[:run], torch.full((run,), 1 / math.sqrt(run)))
    assert not first[run:].any()
    assert float(matrix[-1, -1]) * (-1) ** (run - 1).bit_count() > 0
