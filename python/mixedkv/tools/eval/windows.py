"""The stretches of a text that a model is scored on."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import texts


@dataclass(frozen=True)
class Windows:
    """Stretches of a text, one after the other, none overlapping.

    Attributes
    ----------
    tokens
        int64 [windows, context].
    prompt
        Tokens at a window's start that are read and not scored.
    """

    tokens: torch.Tensor
    prompt: int

    @property
    def scored(self) -> int:
        """Predictions scored in all."""
        windows, context = self.tokens.shape
        return int(windows * (context - self.prompt))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give what is fed in each window, [context - 1], and the tokens to predict."""
        for window in self.tokens:
            yield window[:-1], window[self.prompt :]


def read(path: Path | None) -> str:
    """Give the text of a file, or the prose that every Python carries."""
    if path is None:
        return texts.library_prose()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"there is no text in {path}")
    return text


def title(path: Path | None) -> str:
    """Give what to call a text in print."""
    return "Python's language reference" if path is None else path.name


def cut(text: str, tokenizer: Any, context: int, prompt: int, scored: int) -> Windows:
    """Cut a text into windows.

    Parameters
    ----------
    context, prompt
        Tokens of a window, and those at its start that are not scored. Each window begins with
        the model's own first token, where it has one.
    scored
        Predictions wanted; as many whole windows as it takes.

    Raises
    ------
    ValueError
        The sizes do not go together, or the text is too short.
    """
    if not 1 <= prompt < context:
        raise ValueError(f"prompt must be from 1 to {context - 1} tokens, got {prompt}")
    if scored < 1:
        raise ValueError(f"tokens must be at least 1, got {scored}")
    begin = begin_tokens(tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    fresh = context - len(begin)
    count = -(-scored // (context - prompt))
    if len(ids) < count * fresh:
        raise ValueError(
            f"the text has {len(ids)} tokens, {count} windows of {context} take {count * fresh}"
        )
    parts = ids[: count * fresh].view(count, fresh)
    first = torch.tensor(begin, dtype=torch.int64).expand(count, -1)
    return Windows(torch.cat([first, parts], 1), prompt)


def begin_tokens(tokenizer: Any) -> list[int]:
    """Give what a tokenizer puts before a text: the token of its beginning, or nothing."""
    with_special = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    extra = len(with_special) - len(plain)
    return with_special[:extra] if extra > 0 and with_special[extra:] == plain else []
