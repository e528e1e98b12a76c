"""Recording a model of transformers: what mixedkv's attention got and gave, layer by layer.

The model runs with mixedkv's attention and a `MixedCache`; the cache's observer is called after
each attention, while the step's cells are still pending, and exports the very rows that were
attended, in the types of their tiers.
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

from ..memory import padded
from ..progress import SILENT, Progress
from .format import LayerInfo, RecordedStep, TraceHeader
from .layout import watched
from .masks import sees
from .stored import Rows, zeros

Listener: TypeAlias = Callable[[RecordedStep], None]


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
    k_type, v_type
        Formats of keys and values; of a mixed cache those of the hot tier.
    cold_k_type, cold_v_type
        Those of the cold tier.
    second_mask
        Store the cold part's mask as a tensor of its own.
    sample, seed
        Sample the next token with this seed, instead of taking the likeliest.
    """

    layers: tuple[int, ...] | None = None
    steps: int = 4
    mixed: bool = False
    k_type: str = "f16"
    v_type: str = "f16"
    cold_k_type: str = "q4_0"
    cold_v_type: str = "q4_0"
    hot_size: int = 128
    group_size: int = 256
    sink_tokens: int = 0
    second_mask: bool = False
    sample: bool = False
    seed: int = 0
    threads: int | None = None


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
    room = padded(total)
    options: dict[str, Any] = {"hot_size": room, "quantize": False}
    if settings.mixed:
        options = {
            "hot_size": settings.hot_size,
            "cold_size": room,
            "group_size": settings.group_size,
            "n_pad": math.gcd(settings.hot_size, 32),
            "sink_tokens": settings.sink_tokens,
            "cold_k_type": settings.cold_k_type,
            "cold_v_type": settings.cold_v_type,
        }
    return mkt.MixedCache(
        config,
        preset=None,
        **options,
        hot_k_type=settings.k_type,
        hot_v_type=settings.v_type,
        threads=settings.threads,
    )


def _observe(recorder: Recorder, settings: Settings, seen: mkt.Observation) -> None:
    """Take down one attention of the model: the observer of its cache."""
    if seen.layer not in recorder.wanted:
        return
    if seen.rows != 1 or seen.kept is not None:
        raise ValueError("a trace is of one sequence without padding")
    hot, cold = seen.native.export_rows(seen.place, 0)
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


def _mask(
    first: int, queries: int, keys: NDArray[np.int64], window_left: int | None
) -> NDArray[np.float16]:
    """Give the additive mask [queries, keys]: 0 where a query sees a key, else -inf."""
    seen = sees(first, queries, keys, window_left)
    mask: NDArray[np.float16] = np.where(seen, np.float16(0), np.float16(-np.inf))
    return mask
