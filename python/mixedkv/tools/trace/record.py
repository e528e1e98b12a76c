"""Recording a model of transformers: what mixedkv's attention got and gave, layer by layer.

The model runs with mixedkv's attention and a `MixedCache`; the cache's observer is called after
each attention, while the step's cells are still pending, and exports the very rows that were
attended, in the types of their tiers. Rows of a cache that rotates or centers them say nothing to
anyone else; of these it exports what they stand for.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import mixedkv as mkv
import mixedkv.integrations.transformers as mkt
from mixedkv.cache import presets

from ..memory import padded
from ..progress import SILENT, Progress
from .format import LayerInfo, RecordedStep, TraceHeader
from .layout import watched
from .masks import sees
from .stored import Rows, zeros

Listener: TypeAlias = Callable[[RecordedStep], None]

_WITHOUT_PRESET: dict[str, Any] = {"hot_size": 128, "group_size": 256}
_OF_MIXED = (
    *("cold_k_type", "cold_v_type", "hot_size", "group_size", "sink_tokens", "hot_keep"),
    "center_keys",
)


@dataclass(frozen=True)
class Settings:
    """What to record.

    Attributes
    ----------
    layers
        Layers of the model; None for all.
    steps
        Decode steps after the prompt's own.
    mixed
        A mixed cache; else a standard one of one tier.
    preset
        Of a mixed cache: where its options come from that are None here, made to fit the others.
    k_type, v_type
        Formats of keys and values; of a mixed cache those of the hot tier.
    cold_k_type, cold_v_type
        Those of the cold tier.
    hot_size, group_size, sink_tokens, hot_keep, rotate, center_keys
        As in `mixedkv.CacheConfig`; a standard cache can only rotate.
    second_mask
        Store the cold part's mask as a tensor of its own.
    sample, seed
        Sample the next token with this seed, instead of taking the likeliest.
    """

    layers: tuple[int, ...] | None = None
    steps: int = 4
    mixed: bool = False
    preset: str | None = None
    k_type: str = "f16"
    v_type: str = "f16"
    cold_k_type: str | None = None
    cold_v_type: str | None = None
    hot_size: int | None = None
    group_size: int | None = None
    sink_tokens: int | None = None
    hot_keep: int | None = None
    rotate: bool | None = None
    center_keys: bool | None = None
    second_mask: bool = False
    sample: bool = False
    seed: int = 0
    threads: int | None = None

    def options(self, room: int, config: Any = None) -> dict[str, Any]:
        """Give the options of a cache that has room for so many tokens.

        Parameters
        ----------
        config
            The model's config, whose sliding windows a preset's hot tier holds as a `MixedCache`'s
            does; None: a model without.

        Raises
        ------
        ValueError
            An option is of a mixed cache, and the cache is not; there is no such preset.
        """
        given = {name: getattr(self, name) for name in _OF_MIXED if getattr(self, name) is not None}
        types = {"hot_k_type": self.k_type, "hot_v_type": self.v_type}
        turned = {} if self.rotate is None else {"rotate": self.rotate}
        if self.mixed:
            given = {"cold_size": room, **given, **turned, **types}
            if self.preset is None:
                chosen = {**_WITHOUT_PRESET, **given}
            elif config is None:
                chosen = presets.options(self.preset, **given)
            else:
                chosen = mkt.preset_options(config, self.preset, **given)
            return {**chosen, "n_pad": math.gcd(chosen["hot_size"], 32)}
        if self.preset is not None or given:
            name = "preset" if self.preset is not None else next(iter(given))
            raise ValueError(f"{name} is of a mixed cache, got {getattr(self, name)!r} without one")
        return {"hot_size": room, "quantize": False, **turned, **types}


@dataclass
class Recording:
    """A trace in memory."""

    header: TraceHeader
    steps: list[RecordedStep] = field(default_factory=list)


class Recorder:
    """Takes down what an engine's attention got and gave.

    Parameters
    ----------
    num_layers
        Of the model; `settings.layers` must be among them.
    listener
        Is told of each layer of each step.
    """

    def __init__(
        self,
        header: TraceHeader,
        num_layers: int,
        settings: Settings,
        listener: Listener | None,
    ) -> None:
        self.header = header
        self.steps: list[RecordedStep] = []
        self.step = 0
        self.wanted = set(range(num_layers) if settings.layers is None else settings.layers)
        self.listener = listener
        for layer in sorted(self.wanted):
            if not 0 <= layer < num_layers:
                raise ValueError(f"layer {layer} is none of the model's, 0 to {num_layers - 1}")

    def begin(self, step: int, tokens: Sequence[int]) -> None:
        """Begin a step that takes these tokens."""
        self.step = step
        self.header.tokens.extend(tokens)
        self.header.step_tokens.append(len(tokens))

    def add(self, layer: int, info: LayerInfo, tensors: dict[str, Rows]) -> None:
        """Take down a layer."""
        self.header.layers[layer] = info
        self.steps.append(RecordedStep(layer, self.step, tensors))
        if self.listener is not None:
            self.listener(self.steps[-1])

    def finish(self) -> Recording:
        """Give what was recorded."""
        lacking = self.wanted - set(self.header.layers)
        if lacking:
            raise ValueError(
                f"layer {min(lacking)} of the model has no attention of its own to record"
            )
        return Recording(self.header, self.steps)


@torch.no_grad()
def record(
    model: Any,
    prompt: Sequence[int],
    settings: Settings,
    *,
    title: str = "model",
    listener: Listener | None = None,
    progress: Progress = SILENT,
) -> Recording:
    """Run a model over a prompt and some decode steps, and record its attention.

    Parameters
    ----------
    model
        A causal model loaded with ``attn_implementation="mixedkv"``.
    prompt
        Token ids.

    Raises
    ------
    ValueError
        The settings don't fit the model or one another.
    """
    import transformers

    if not prompt:
        raise ValueError("the prompt has no token")
    header = TraceHeader(
        engine="transformers",
        engine_version=f"transformers {transformers.__version__}, mixedkv {mkv.__version__}",
        model=title,
        cache="mixed" if settings.mixed else "standard",
        notes={"isa": mkv.isa.active()},
    )
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    recorder = Recorder(header, num_layers, settings, listener)
    cache = make_cache(model.config, len(prompt) + settings.steps, settings)
    options = settings.options(0, model.config)
    header.notes |= {
        name: "on" for name in ("rotate", "center_keys", "fit_scales") if options.get(name)
    }
    cache.observer = partial(_observe, recorder, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    fed = list(prompt)
    for step in range(1, settings.steps + 2):
        recorder.begin(step, fed)
        logits = model(
            torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        progress.at(step, settings.steps + 1)
        if settings.sample:
            probability = torch.softmax(logits.float(), -1)
            token = int(torch.multinomial(probability, 1, generator=generator))
        else:
            token = int(logits.argmax())
        fed = [token]
    return recorder.finish()


def make_cache(config: Any, total: int, settings: Settings) -> mkt.MixedCache:
    """Give the cache to record from, with room for `total` tokens."""
    # The settings have a preset's options already.
    options = settings.options(padded(total), config)
    return mkt.MixedCache(config, preset=None, **options, threads=settings.threads)


def _observe(recorder: Recorder, settings: Settings, seen: mkt.Observation) -> None:
    """Take down one attention of the model: the observer of its cache."""
    if seen.layer not in recorder.wanted:
        return
    if seen.rows != 1 or seen.kept is not None:
        raise ValueError("a trace is of one sequence without padding")
    stored = _stored(seen.native.config, settings)
    hot, cold = seen.native.export_rows(seen.place, 0, dequantize=bool(stored))
    recorder.header.stored.update(stored)
    queries = seen.query.shape[2]
    q = watched("Q, the model's [1, head, query, dim]", seen.query.float().numpy())
    q = watched("Q [head, query, dim]", np.array(q[0], np.float32, order="C"))
    out = watched("kqv_out, the op's [1, query, head, dim]", seen.out.float().numpy())
    out = np.array(out[0], np.float32, order="C").reshape(queries, -1)
    watched("kqv_out [query, head * dim]", out)
    at = np.arange(seen.first + seen.width - queries, seen.first + seen.width)
    window = seen.options["window_left"]
    tensors: dict[str, Rows] = {
        "kqv_out": out,
        "q": q,
        "k": watched("K [kv head, key, dim], hot", hot.k),
        "v": watched("V [kv head, key, dim], hot", hot.v),
    }
    masks = [_mask(int(at[0]), len(at), hot.positions, window)]
    if settings.mixed:
        # GGUF readers choke on empty tensors: where no key was cold, one cell of zeros that
        # is masked stands in.
        positions, k, v = cold.positions, cold.k, cold.v
        if not len(positions):
            positions = np.array([-1])
            k, v = (zeros(rows, (rows.shape[0], 1)) for rows in (k, v))
        masks.insert(0, _mask(int(at[0]), len(at), positions, window))
        tensors["k_quant"] = watched("K_quant [kv head, key, dim], cold", k)
        tensors["v_quant"] = watched("V_quant [kv head, key, dim], cold", v)
        recorder.header.positions_quant[recorder.step] = positions
        if settings.second_mask:
            tensors["mask_quant"] = watched("mask_quant [query, key]", masks.pop(0))
    tensors["mask"] = watched("mask [query, key]", np.concatenate(masks, 1))
    recorder.header.positions[recorder.step] = hot.positions
    sinks = seen.options["sinks"]
    scale = seen.options["sm_scale"]
    info = LayerInfo(
        num_qo_heads=q.shape[0],
        num_kv_heads=hot.k.shape[0],
        head_dim=q.shape[2],
        head_dim_v=seen.out.shape[3],
        sm_scale=1 / math.sqrt(q.shape[2]) if scale is None else float(scale),
        logits_soft_cap=float(seen.options["logits_soft_cap"]),
        sinks=None if sinks is None else tuple(sinks.tolist()),
        window_left=-1 if window is None else int(window),
    )
    recorder.add(seen.layer, info, tensors)


def _stored(config: mkv.CacheConfig, settings: Settings) -> dict[str, str]:
    """Give the formats of rows that are recorded as what they stand for, by role."""
    if not (config.rotate or config.center_keys):
        return {}
    found = {"k": config.hot_k_type, "v": config.hot_v_type}
    if settings.mixed:
        found |= {"k_quant": config.cold_k_type, "v_quant": config.cold_v_type}
    return found


def _mask(
    first: int, queries: int, keys: NDArray[np.int64], window_left: int | None
) -> NDArray[np.float16]:
    """Give the additive mask [queries, keys]: 0 where a query sees a key, else -inf."""
    seen = sees(first, queries, keys, window_left)
    mask: NDArray[np.float16] = np.where(seen, np.float16(0), np.float16(-np.inf))
    return mask
