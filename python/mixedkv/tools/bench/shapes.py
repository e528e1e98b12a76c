"""Shapes of attention in real models, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer's attention: num_qo_heads query heads read num_kv_heads of width head_dim."""

    name: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        numbers = (self.num_qo_heads, self.num_kv_heads, self.head_dim)
        if min(numbers) < 1:
            raise ValueError(f"sizes of a shape must be positive, got {numbers}")
        if self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                f"num_qo_heads must be a multiple of num_kv_heads, got {self.num_qo_heads} "
                f"and {self.num_kv_heads}"
            )
        if self.head_dim % 32:
            raise ValueError(
                f"head_dim must be a multiple of 32 (a block of most formats), got {self.head_dim}"
            )

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(query heads, kv heads, head dim)."""
        return self.num_qo_heads, self.num_kv_heads, self.head_dim

    def __str__(self) -> str:
        return f"{self.name} ({self.num_qo_heads}, {self.num_kv_heads}, {self.head_dim})"


MODELS = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 32, 8, 128),
        Shape("qwen3-8b", 32, 8, 128),
        Shape("qwen3-0.6b", 16, 8, 128),
        Shape("smollm2-135m", 9, 3, 64),
        Shape("mha", 32, 32, 128),  # Llama 2 7B
        Shape("gemma-2b", 8, 1, 256),
    )
}

#: What runs without --model, and without --format.
DEFAULT_MODELS = ("llama-3.1-8b", "smollm2-135m", "mha")
DEFAULT_FORMATS = ("f16", "q4_0")


def parse_shape(text: str) -> Shape:
    """Return the shape of a model's name, or of "Hq,Hkv,D".

    Raises
    ------
    ValueError
        Where it is neither.
    """
    known = MODELS.get(text.strip().lower())
    if known is not None:
        return known
    parts = text.strip().strip("()").split(",")
    try:
        num_qo_heads, num_kv_heads, head_dim = (int(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"a model must be one of {', '.join(MODELS)}, or three numbers Hq,Hkv,D; got {text!r}"
        ) from None
    return Shape("custom", num_qo_heads, num_kv_heads, head_dim)
