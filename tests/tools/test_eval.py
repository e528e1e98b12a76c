"""`mixedkv eval` and its retrieval check, whole, on small random models."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("platformdirs")
pytest.importorskip("typer")

import small  # noqa: E402
from mixedkv.tools import evaluate, models  # noqa: E402
from mixedkv.tools.eval import (  # noqa: E402
    configurations,
    evaluation,
    retrieval,
    runs,
    session,
    windows,
)
from mixedkv.tools.progress import Silent  # noqa: E402
from small import one_thread  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The cache holds a key. As said above, the value of a token is secret and moves on. " * 60


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> models.LoadedModel:
    torch.manual_seed(0)
    found = small.llama()
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: found)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> session.Settings:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return session.Settings(
        configurations=configurations.parse_all(
            ["q4: hot_size=64", "q8: cold_k_type=q8_0 cold_v_type=q8_0 hot_size=64 sink_tokens=2"]
        ),
        model="small",
        text=path,
        tokens=600,
        context=320,
        prompt=64,
        facts=3,
        texts=2,
    )


class Heard(Silent):
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.last: tuple[float, float] = (0, 0)
        self.all: list[str] = []

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append(title)

    def at(self, done: float, total: float, what: str = "") -> None:
        self.last = (done, total)
        self.all.append(what)


def token_by_token(loaded: models.LoadedModel, inputs: Any, options: dict[str, Any]) -> Any:
    cache = runs.RealCache(loaded.model.config, options)
    return torch.cat([part for _, part in runs.feed(loaded.model, inputs, cache, most=1)])


def test_figures_are_those_of_decoding(
    loaded: models.LoadedModel, settings: session.Settings
) -> None:
    heard = Heard()
    result = evaluation.run(settings, heard)
    assert (result.tokens, result.windows) == (768, 3)
    cut = windows.cut(TEXT, loaded.tokenizer, 320, 64, 600)
    kl, same, change = [], [], []
    for inputs, targets in cut:
        exact = token_by_token(loaded, inputs, {"quantize": False, "hot_size": 320})[63:]
        other = token_by_token(loaded, inputs, {"hot_size": 64, "cold_size": 320})[63:]
        kl.append(evaluate.kl_divergence(exact, other))
        same.append(evaluate.same_top_token(exact, other))
        losses = [
            evaluate.negative_log_likelihood(each, targets.numpy()) for each in (other, exact)
        ]
        change.append(losses[0] - losses[1])
    q4 = result.caches[0]
    assert math.isclose(q4.figures.kl_mean.value, np.concatenate(kl).mean(), rel_tol=0.02)
    assert math.isclose(q4.figures.kl_99.value, np.quantile(np.concatenate(kl), 0.99), rel_tol=0.05)
    assert abs(q4.figures.same_top.value - np.concatenate(same).mean()) < 0.01
    percent = 100 * (math.exp(np.concatenate(change).mean()) - 1)
    assert math.isclose(q4.figures.perplexity_change.value, percent, rel_tol=0.05)
    blocks = np.concatenate([each.reshape(2, 128).mean(1) for each in kl])
    error = blocks.std(ddof=1) / math.sqrt(6)
    assert math.isclose(q4.figures.kl_mean.error, error, rel_tol=0.05)

    # The f16 run is compared with itself, and what a cache takes is what it says.
    assert result.f16.figures.kl_mean.value == 0
    assert result.f16.figures.same_top.value == 1
    assert result.f16.cold_bits is None
    assert (q4.cold_bits, result.caches[1].cold_bits) == (4.5, 8.5)
    assert q4.hot_tokens + q4.cold_tokens == 319
    assert result.caches[1].figures.kl_mean.value < 0.1 * q4.figures.kl_mean.value
    assert heard.last == (3 * 3 * 319, 3 * 3 * 319)
    assert heard.all[-1] == "window 3 of 3: q8"
    found = json.loads(json.dumps(result.as_dict()))
    assert found["model"] == "small"
    assert found["caches"][0]["figures"]["kl_mean"]["value"] == q4.figures.kl_mean.value
    assert found["caches"][0]["options"] == {"hot_size": 64, "cold_size": 288}


def test_simulation_beside(loaded: models.LoadedModel, settings: session.Settings) -> None:
    result = evaluation.run(dataclasses.replace(settings, simulate=True))
    for cache in result.caches:
        assert cache.simulated is not None
        own, simulated = cache.figures.kl_mean, cache.simulated.kl_mean
        assert abs(own.value - simulated.value) < 3 * math.hypot(own.error, simulated.error)
    assert loaded.model.config._attn_implementation == "mixedkv"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 2000}, "context must be at most the 1024 positions of small, got 2000"),
        ({"tokens": 9000}, "the text has .* tokens, 36 windows of 320 take"),
        ({"prompt": 320}, "prompt must be from 1 to 319"),
        (
            {"configurations": [configurations.Configuration("odd", {"hot_size": 33})]},
            "configuration 'odd': hot_size",
        ),
    ],
)
def test_settings_that_cannot_be(
    loaded: models.LoadedModel, settings: session.Settings, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        evaluation.run(dataclasses.replace(settings, **changes))


def test_facts_stand_where_they_say() -> None:
    made = retrieval.plant(TEXT, small.Words(), context=300, facts=4, texts=2, seed=0)
    assert len(made) == 2
    for haystack in made:
        assert haystack.tokens[0] == 0
        longest = max(len(each.ask) + len(each.answer) for each in haystack.questions)
        assert len(haystack.tokens) + longest == 300
        held = haystack.tokens.tolist()
        for place, question in enumerate(haystack.questions):
            assert question.place == place
            assert abs(question.depth - (place + 0.5) / 4) < 0.1
            start = round(question.depth * (300 - longest))
            # "secret number of" the place "is" and the answer stand there, and nowhere else.
            fact = [*question.ask.tolist()[4:], *question.answer.tolist()]
            at = [i for i in range(len(held)) if held[i : i + len(fact)] == fact]
            assert len(at) == 1
            assert start <= at[0] <= start + 4
    assert made[0].questions[0].answer.tolist() != made[1].questions[0].answer.tolist()
    with pytest.raises(ValueError, match="facts must be from 1 to 16, got 17"):
        retrieval.plant(TEXT, small.Words(), 300, 17, 1, 0)
    with pytest.raises(ValueError, match="context must be longer for 16 facts, got 300"):
        retrieval.plant(TEXT, small.Words(), 300, 16, 1, 0)
    with pytest.raises(ValueError, match=r"the text has .* tokens, 50 texts of 300 take more"):
        retrieval.plant(TEXT, small.Words(), 300, 4, 50, 0)


def test_retrieval(loaded: models.LoadedModel, settings: session.Settings) -> None:
    result = retrieval.run(settings)
    assert result.f16.asked == 6
    assert result.f16.change.value == 0
    assert result.caches[0].change.value != 0
    assert abs(result.caches[1].change.value) < abs(result.caches[0].change.value) + 1e-3
    made = retrieval.plant(TEXT, loaded.tokenizer, 320, 3, 2, 0)
    expected = []
    for haystack in made:
        for question in haystack.questions:
            whole = torch.cat([haystack.tokens, question.ask, question.answer])
            with torch.no_grad():
                logits = loaded.model(whole[None], use_cache=False).logits[0]
            at = len(whole) - len(question.answer) - 1
            log_p = torch.log_softmax(logits[at:-1], 1).gather(1, question.answer[:, None])
            expected.append(float(log_p.sum()))
    found = [answer.log_probability for answer in result.f16.answers]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    json.dumps(result.as_dict())


def test_a_question_leaves_no_trace(loaded: models.LoadedModel, settings: session.Settings) -> None:
    """Asked one after the other or each of a cache of its own, answers are the same."""
    (haystack,) = retrieval.plant(TEXT, loaded.tokenizer, 320, 3, 1, 0)
    for options in ({"hot_size": 64, "cold_size": 320}, {"hot_size": 32, "cold_size": 320}):

        def make(options: dict[str, Any] = options) -> runs.RealCache:
            return runs.RealCache(loaded.model.config, options)

        together = retrieval.ask(loaded.model, make, [haystack], Silent(), "")
        apart = [
            retrieval.ask(
                loaded.model,
                make,
                [dataclasses.replace(haystack, questions=[question])],
                Silent(),
                "",
            )[0]
            for question in haystack.questions
        ]
        assert together == apart


def test_found_means_every_token(loaded: models.LoadedModel) -> None:
    """A model that was taught to say the answer finds it; one that errs in one token does not."""
    (haystack,) = retrieval.plant(TEXT, loaded.tokenizer, 320, 1, 1, 0)
    question = haystack.questions[0]
    whole = torch.cat([haystack.tokens, question.ask, question.answer])
    asked = len(whole) - len(question.answer)

    class Knows:
        config = loaded.model.config
        wrong = -1

        def __call__(self, ids: Any, past_key_values: Any, logits_to_keep: int) -> Any:
            first = past_key_values.get_seq_length()
            output = loaded.model(
                ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep
            )
            for row in range(logits_to_keep):
                at = first + ids.shape[1] - logits_to_keep + row + 1
                if asked <= at < len(whole) and at != self.wrong:
                    output.logits[0, row, whole[at]] = 50.0
            return output

    def make() -> runs.RealCache:
        return runs.RealCache(loaded.model.config, {"hot_size": 64, "cold_size": 320})

    model = Knows()
    (answer,) = retrieval.ask(model, make, [haystack], Silent(), "")
    assert answer.found
    assert -1e-3 < answer.log_probability <= 0
    model.wrong = len(whole) - 1
    (answer,) = retrieval.ask(model, make, [haystack], Silent(), "")
    assert not answer.found
    assert answer.log_probability < -1
