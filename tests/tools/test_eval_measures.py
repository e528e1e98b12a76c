"""Figures and their standard errors, configurations, windows: the parts of `mixedkv eval`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")

from mixedkv.tools import evaluate  # noqa: E402
from mixedkv.tools.eval import configurations, measures, windows  # noqa: E402


def logits(seed: int, rows: int = 300, vocabulary: int = 50) -> Any:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_compare_against_float64() -> None:
    p = logits(0)
    q = p + 0.1 * logits(1)
    targets = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(2))
    found = measures.compare(p, q, targets)
    np.testing.assert_allclose(found.kl, evaluate.kl_divergence(p, q), rtol=1e-4, atol=1e-6)
    want = evaluate.negative_log_likelihood(q, targets.numpy())
    np.testing.assert_allclose(found.loss, want, rtol=1e-5)
    np.testing.assert_array_equal(found.same, evaluate.same_top_token(p, q))
    own = measures.compare(p, p, targets)
    assert not own.kl.any()
    assert own.same.all()


def test_compare_of_tokens_ruled_out() -> None:
    p, q = logits(0, rows=2), logits(1, rows=2)
    p[0, 3] = -math.inf
    q[1, 3] = -math.inf
    found = measures.compare(p, q, torch.zeros(2, dtype=torch.int64))
    assert np.isfinite(found.kl[0])
    assert found.kl[1] == math.inf


def figures(kl: np.ndarray) -> measures.TokenFigures:
    return measures.TokenFigures(2 + kl, kl, kl < 1)


def test_standard_errors_of_independent_tokens() -> None:
    """Where tokens are independent, block means have the textbook error."""
    random = np.random.default_rng(0)
    values = random.exponential(1.0, 200 * 64)
    found = measures.summarise([figures(values)], [figures(0 * values)], 64)
    assert (found.tokens, found.blocks) == (200 * 64, 200)
    assert math.isclose(found.kl_mean.value, values.mean())
    assert math.isclose(found.kl_mean.error, 1 / math.sqrt(len(values)), rel_tol=0.15)
    share = values < 1
    assert math.isclose(found.same_top.value, share.mean())
    assert math.isclose(found.same_top.error, share.std() / math.sqrt(len(values)), rel_tol=0.15)
    # Of the quantile at p of an exponential: sqrt(p (1 - p) / n) / density, density 1 - p.
    assert math.isclose(found.kl_99.value, np.quantile(values, 0.99))
    expected = math.sqrt(0.99 * 0.01 / len(values)) / 0.01
    assert math.isclose(found.kl_99.error, expected, rel_tol=0.25)
    assert math.isclose(found.perplexity.value, math.exp(2 + values.mean()))
    assert math.isclose(found.perplexity_change.value, 100 * (math.exp(values.mean()) - 1))


def test_standard_errors_of_tokens_that_go_together() -> None:
    """Repeating each value 16 times says nothing new, and the error knows."""
    random = np.random.default_rng(1)
    fresh = random.exponential(1.0, 100 * 8)
    repeated = np.repeat(fresh, 16)
    few = measures.summarise([figures(fresh)], [figures(0 * fresh)], 8)
    many = measures.summarise([figures(repeated)], [figures(0 * repeated)], 128)
    assert math.isclose(few.kl_mean.error, many.kl_mean.error)


def test_stretches_are_cut_into_blocks_each() -> None:
    parts = [figures(np.full(10, value)) for value in (0.0, 1.0)]
    found = measures.summarise(parts, parts, 4)
    assert (found.tokens, found.blocks) == (20, 4)
    assert found.kl_mean.value == 0.5
    assert math.isclose(found.kl_mean.error, np.std([0, 0, 1, 1], ddof=1) / 2)
    assert found.perplexity_change == measures.Estimate(0.0, 0.0)
    assert math.isnan(measures.summarise(parts[:1], parts[:1], 8).kl_mean.error)


def test_configurations() -> None:
    found = configurations.parse("my cache: cold_k_type=q8_0, threshold=0.5 quantize=1 hot_size=64")
    assert found.name == "my cache"
    assert found.options == {
        "cold_k_type": "q8_0",
        "threshold": 0.5,
        "quantize": True,
        "hot_size": 64,
    }
    assert configurations.parse("hot_size=64").name == "hot_size=64"
    preset = configurations.parse("tiny hot_keep=32")
    assert preset.options["hot_keep"] == 32
    assert preset.options["cold_k_type"] == "nl3"
    assert [each.name for each in configurations.parse_all([])] == [
        "near_lossless",
        "balanced",
        "small",
        "tiny",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has a preset or options, got ''"),
        ("name:", "has a preset or options"),
        ("huge", r"preset must be one of near_lossless, .*, got 'huge'"),
        ("tiny small", "one preset at most, got tiny and small"),
        ("hot=3", "no option 'hot'"),
        ("head_dim=3", "no option 'head_dim'"),
        ("hot_size=many", "hot_size must be a whole number, got 'many'"),
        ("threshold=much", "threshold must be a number, got 'much'"),
        ("quantize=maybe", "quantize must be 1 or 0, got 'maybe'"),
    ],
)
def test_configurations_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        configurations.parse(text)


def test_two_configurations_of_one_name() -> None:
    with pytest.raises(ValueError, match="two configurations have the name 'a'"):
        configurations.parse_all(["a: hot_size=64", "a: hot_size=32"])


def test_cold_size_that_a_context_takes() -> None:
    assert configurations.sized({"hot_size": 64}, 200)["cold_size"] == 160  # 200 - 51, padded
    assert configurations.sized({"hot_size": 64}, 20)["cold_size"] == 32
    assert configurations.sized({"cold_size": 32}, 200) == {"cold_size": 32}
    assert "cold_size" not in configurations.sized({"quantize": False}, 200)


def test_windows() -> None:
    small = pytest.importorskip("small")
    text = "the cache holds a key of the value . " * 40
    cut = windows.cut(text, small.Words(), context=16, prompt=4, scored=30)
    assert cut.tokens.shape == (3, 16)
    assert cut.scored == 36
    ids = small.Words()(text, add_special_tokens=False).input_ids
    assert cut.tokens[:, 0].tolist() == [0, 0, 0]  # each begins as the model expects
    assert cut.tokens[:, 1:].reshape(-1).tolist() == ids[:45]
    inputs, targets = next(iter(cut))
    assert inputs.tolist() == cut.tokens[0, :-1].tolist()
    assert targets.tolist() == cut.tokens[0, 4:].tolist()
    plain = windows.cut(text, small.Words(begins=False), context=16, prompt=4, scored=30)
    assert plain.tokens.reshape(-1).tolist() == ids[:48]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 16}, "prompt must be from 1 to 15 tokens, got 16"),
        ({"scored": 0}, "tokens must be at least 1, got 0"),
        ({"scored": 400}, "the text has 9 tokens, 34 windows of 16 take 510"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, int], words: str) -> None:
    small = pytest.importorskip("small")
    sizes = {"context": 16, "prompt": 4, "scored": 12, **options}
    with pytest.raises(ValueError, match=words):
        windows.cut("the cache holds a key of the value .", small.Words(), **sizes)


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        windows.read(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="there is no text in"):
        windows.read(path)
