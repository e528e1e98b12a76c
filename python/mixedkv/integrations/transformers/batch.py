"""The batch that a MixedCache holds, as far as its committed steps go."""

from __future__ import annotations

import dataclasses

import torch

from mixedkv.cache.arguments import positive
from mixedkv.cache.presets import MOST_SEQUENCES

from .steps import Step


@dataclasses.dataclass(eq=False)
class Batch:
    """Rows, columns and padding.

    Attributes
    ----------
    max_rows
        Rows to make room for; None: those of the first batch.
    room_for
        Rows that the native caches are made for.
    rows, columns
        Rows, None where there are none yet, and columns of each, padded ones too.
    validity
        Padding of the columns, None where nothing is padded.
    bases
        Each row's first unpadded column, None where there is none yet; empty for an empty cache.
    """

    max_rows: int | None = None
    room_for: int = 0
    rows: int | None = None
    columns: int = 0
    validity: torch.Tensor | None = None
    bases: list[int | None] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            self.max_rows = positive(self.max_rows, "max_batch_size")
            if self.max_rows > MOST_SEQUENCES:
                raise ValueError(
                    f"max_batch_size must be at most {MOST_SEQUENCES}, got {self.max_rows}"
                )

    def make_room(self, rows: int) -> bool:
        """Have room for this many rows; tell whether it is more than before."""
        if rows <= self.room_for:
            return False
        if self.max_rows is not None and rows > self.max_rows:
            raise ValueError(f"got {rows} rows, max_batch_size is {self.max_rows}")
        self.room_for = max(rows, self.max_rows or 1)
        return True

    def add(self, step: Step) -> None:
        """Take a step's columns."""
        self.rows = step.rows
        self.columns = step.first + step.width
        self.validity = step.validity
        self.bases = step.bases

    def crop(self, keep: int) -> None:
        """Keep the first columns."""
        self.bases = [None if base is None or base >= keep else base for base in self.bases]
        self.columns = keep
        if self.validity is not None:
            self._pad(self.validity[:, :keep])

    def take(self, sources: list[int]) -> None:
        """Make row i what row sources[i] was."""
        self.rows = len(sources)
        self.bases = [self.bases[row] for row in sources]
        if self.validity is not None:
            self._pad(self.validity[sources])

    def check_rows(self, sources: list[int]) -> None:
        """Refuse sources that are no rows, or more than there is room for."""
        assert self.rows is not None
        wrong = [row for row in sources if not 0 <= row < self.rows]
        if wrong or not sources:
            raise ValueError(
                f"rows must be in [0, {self.rows}), at least one: got {wrong or sources}"
            )
        if len(sources) > self.room_for:
            raise ValueError(
                f"{len(sources)} rows asked of a cache with room for {self.room_for}: make it "
                f"with max_batch_size={len(sources)}"
            )

    def forget(self) -> None:
        """Hold nothing; the room stays."""
        self.rows = None
        self.columns = 0
        self.validity = None
        self.bases = []

    def _pad(self, validity: torch.Tensor) -> None:
        self.validity = None if bool(validity.all()) else validity
