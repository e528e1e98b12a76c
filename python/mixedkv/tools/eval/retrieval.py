"""Facts planted in a long text, and asked for at its end: what perplexity may hide.

A text holds several facts, each at a depth of its own, of the kind "The secret number of Brindle
is 48213". At the end each is asked for in turn. A fact is *found* where the model, generating
greedily, gives its answer exactly; a small model fails often even in f16, so the log-probability
of the answer is told as well. Both come out of one pass over question and answer: greedy
generation gives the answer if and only if each of its tokens is the likeliest after those before.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..progress import SILENT, Progress
from . import runs, windows
from .configurations import sized
from .measures import Estimate, mean
from .session import Settings, check_settings, f16_options, load, versions

PLACES = (
    *("Brindle", "Tamsworth", "Oakmere", "Pellow", "Garrick", "Hexley", "Norwold", "Stanmoor"),
    *("Ulverton", "Crale", "Dunmarsh", "Felbridge", "Ivybank", "Kestrel", "Lorton", "Wexcombe"),
)


@dataclass(frozen=True)
class Question:
    """One fact.

    Attributes
    ----------
    place
        Which of its text's facts it is, from the first on.
    depth
        Where in the text it stands, 0 to 1.
    ask
        int64 [tokens]: what the text goes on with.
    answer
        int64 [tokens]: what should follow.
    """

    place: int
    depth: float
    ask: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it: int64 [tokens], and what is asked at its end."""

    tokens: torch.Tensor
    questions: list[Question]


@dataclass(frozen=True)
class Answer:
    """What a cache made of a question.

    Attributes
    ----------
    place, depth
        Of the fact in its text.
    found
        Greedy generation gives the answer exactly.
    log_probability
        Of the whole answer, in nats.
    """

    place: int
    depth: float
    found: bool
    log_probability: float


@dataclass(frozen=True)
class Retrieved:
    """What a cache made of all questions.

    Attributes
    ----------
    log_probability, change
        Mean log-probability of the answers, in nats, and how much above that of the f16 cache;
        errors take the questions as independent of each other.
    """

    name: str
    options: dict[str, Any]
    found: int
    asked: int
    log_probability: Estimate
    change: Estimate
    answers: list[Answer]


@dataclass(frozen=True)
class Result:
    """What the retrieval check found."""

    title: str
    text: str
    context: int
    f16: Retrieved
    caches: list[Retrieved]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings, lists and dicts, for JSON."""
        found = dataclasses.asdict(self)
        return {**versions(), "model": found.pop("title"), **found}


def run(settings: Settings, progress: Progress = SILENT) -> Result:
    """Plant facts and ask for them, through an f16 cache and each of the others.

    Raises
    ------
    ValueError
        The settings ask for more than the model or the text has, or an option is wrong.
    models.ModelError
        The model could not be fetched or loaded.
    """
    begun = time.perf_counter()
    check_settings(settings)
    text = windows.read(settings.text)
    loaded = load(settings, progress)
    haystacks = plant(
        text, loaded.tokenizer, settings.context, settings.facts, settings.texts, settings.seed
    )
    f16: list[Answer] = []
    found: list[Retrieved] = []
    config = loaded.model.config
    named = [(each.name, each.for_model(config)) for each in settings.configurations]
    for name, options in [("f16", f16_options(settings.context)), *named]:
        options = sized(options, settings.context)
        progress.phase(name, settings.facts * settings.texts)
        make = partial(runs.RealCache, loaded.model.config, options)
        answers = ask(loaded.model, make, haystacks, progress, name)
        f16 = f16 or answers
        found.append(_sum_up(name, options, answers, f16))
    return Result(
        title=loaded.title,
        text=windows.title(settings.text),
        context=settings.context,
        f16=found[0],
        caches=found[1:],
        seconds=time.perf_counter() - begun,
    )


def _sum_up(
    name: str, options: dict[str, Any], answers: list[Answer], f16: list[Answer]
) -> Retrieved:
    own = np.array([answer.log_probability for answer in answers])
    others = np.array([answer.log_probability for answer in f16])
    return Retrieved(
        name=name,
        options=options,
        found=sum(answer.found for answer in answers),
        asked=len(answers),
        log_probability=mean(own),
        change=mean(own - others),
        answers=answers,
    )


def plant(
    text: str, tokenizer: Any, context: int, facts: int, texts: int, seed: int
) -> list[Haystack]:
    """Make texts with facts in them.

    Parameters
    ----------
    context
        Tokens of a text with a question and its answer.
    facts
        In each text, at depths in equal steps.
    texts
        How many, one after the other out of `text`.
    seed
        Of the numbers and of the order of the places.

    Raises
    ------
    ValueError
        The text is too short, or the context for so many facts.
    """
    if not 1 <= facts <= len(PLACES):
        raise ValueError(f"facts must be from 1 to {len(PLACES)}, got {facts}")
    chance = random.Random(seed)
    begin = windows.begin_tokens(tokenizer)

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    source = ids(text)
    made, used = [], 0
    for _ in range(texts):
        places = chance.sample(PLACES, facts)
        numbers = [f"{chance.randrange(10**5):05d}" for _ in places]
        planted = [
            ids(f"\n\nThe secret number of {place} is {number}.\n\n")
            for place, number in zip(places, numbers, strict=True)
        ]
        asked = [ids(f"\n\nAs said above, the secret number of {place} is") for place in places]
        # The answer is told apart from the question by tokens, whichever way they are cut.
        answers = [
            ids(f"\n\nAs said above, the secret number of {place} is {number}.")[len(ask) :]
            for place, number, ask in zip(places, numbers, asked, strict=True)
        ]
        longest = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
        room = context - len(begin) - sum(map(len, planted)) - longest
        if room < facts:
            raise ValueError(f"context must be longer for {facts} facts, got {context}")
        if used + room > len(source):
            raise ValueError(
                f"the text has {len(source)} tokens, {texts} texts of {context} take more"
            )
        tokens = list(begin)
        depths = []
        for number, fact in enumerate(planted):
            # Equal shares of the text, half a share before the first fact and after the last one.
            start = used + max(0, room * (2 * number - 1) // (2 * facts))
            stop = used + room * (2 * number + 1) // (2 * facts)
            tokens += source[start:stop]
            depths.append(len(tokens) / (context - longest))
            tokens += fact
        tokens += source[used + room * (2 * facts - 1) // (2 * facts) : used + room]
        used += room
        made.append(
            Haystack(
                torch.tensor(tokens),
                [
                    Question(place, depth, torch.tensor(ask), torch.tensor(answer))
                    for place, (depth, ask, answer) in enumerate(
                        zip(depths, asked, answers, strict=True)
                    )
                ],
            )
        )
    return made


def ask(
    model: Any,
    make: Callable[[], runs.RealCache],
    haystacks: Sequence[Haystack],
    progress: Progress,
    what: str,
) -> list[Answer]:
    """Let a model read texts through a cache and answer.

    Parameters
    ----------
    make
        Gives a cache that holds nothing.
    progress, what
        Told of each question, and what to call the run.
    """
    total = sum(len(haystack.questions) for haystack in haystacks)
    answers: list[Answer] = []
    for haystack in haystacks:
        cache: runs.RealCache | None = None
        for question in haystack.questions:
            if cache is None:
                cache = make()
                _read(model, haystack.tokens, cache)
            answer, moved = _answer(model, question, cache)
            answers.append(answer)
            progress.at(len(answers), total, what)
            if moved:
                # What the question pushed out of hot stays cold: the next one reads again.
                cache = None
    return answers


def _read(model: Any, tokens: torch.Tensor, cache: runs.RealCache) -> None:
    for _ in runs.feed(model, tokens, cache, len(tokens)):
        pass


def _answer(model: Any, question: Question, cache: runs.RealCache) -> tuple[Answer, bool]:
    """Answer, and take question and answer back; tell whether they made tokens move."""
    before = cache.cache.stats().moved
    inputs = torch.cat([question.ask, question.answer[:-1]])
    fed = runs.feed(model, inputs, cache, len(question.ask) - 1)
    logits = torch.cat([part for _, part in fed])
    log_p = torch.log_softmax(logits, 1).gather(1, question.answer[:, None])
    found = bool((logits.argmax(1) == question.answer).all())
    moved = cache.cache.stats().moved != before
    if not moved:
        cache.cache.crop(-len(inputs))
    return Answer(question.place, question.depth, found, float(log_p.double().sum())), moved
