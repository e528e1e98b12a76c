"""What a MixedCache needs to know of a model's config."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.cache_utils import get_layer_types_and_kwargs

_GEOMETRY = (
    "num_key_value_heads",
    "num_attention_heads",
    "hidden_size",
    "head_dim",
    "v_head_dim",
)


class LayerPlan(NamedTuple):
    """One layer: whether it brings keys of its own, and the keys a query sees (None: all)."""

    has_keys: bool
    window: int | None


class CachePlan(NamedTuple):
    """A model's layers, as a cache sees them.

    Attributes
    ----------
    layers
        One entry for each layer of the model.
    geometries
        The layers that have keys, in groups of equal heads and head_dim, in order.
    keys_are_reused
        Some layers attend over the keys of an earlier one.
    """

    layers: list[LayerPlan]
    geometries: list[list[int]]
    keys_are_reused: bool

    @property
    def window(self) -> int | None:
        """The largest sliding window of a layer; None: there is none."""
        return max((layer.window for layer in self.layers if layer.window), default=None)


def read_config(config: Any) -> CachePlan:
    """Read a model's config; ValueError names what a MixedCache can't serve."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("a MixedCache serves decoder-only models, this is an encoder-decoder one")
    text_config = config.get_text_config(decoder=True)
    if not getattr(text_config, "is_causal", True):
        raise ValueError("a MixedCache serves causal models, this config has is_causal=False")
    types, arguments = get_layer_types_and_kwargs(text_config)

    layers = []
    for index, (kind, kwargs) in enumerate(zip(types, arguments, strict=True)):
        if kind in ("dummy", "moe", "mlp"):
            layers.append(LayerPlan(False, None))
        elif kind == "full_attention":
            layers.append(LayerPlan(True, None))
        elif kind == "sliding_attention":
            layers.append(LayerPlan(True, int(kwargs["sliding_window"])))
        else:
            raise ValueError(
                f"layer {index} is of type {kind!r}; a MixedCache serves full_attention and "
                "sliding_attention layers"
            )
    with_keys = [index for index, layer in enumerate(layers) if layer.has_keys]
    if not with_keys:
        raise ValueError("the config has no attention layer")

    per_layer = getattr(text_config, "per_layer_config", None) or [text_config] * len(layers)
    geometries: dict[tuple[Any, ...], list[int]] = {}
    for index in with_keys:
        key = tuple(getattr(per_layer[index], name, None) for name in _GEOMETRY)
        geometries.setdefault(key, []).append(index)
    # Releases before 5.23 leave the layers that reuse keys out of the list of types.
    reused = "reuse" in (getattr(text_config, "kv_sharing_modes", None) or [])
    reused = reused or bool(getattr(text_config, "num_kv_shared_layers", None))
    return CachePlan(layers, list(geometries.values()), reused)
