"""The command ``mixedkv trace``."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import mixedkv as mkv
from mixedkv.cache import presets

from ..._commands import (
    check_output,
    naming,
    need,
    one_line,
    print_json,
    printable,
    quiet_transformers,
    set_threads,
)
from ...options import (
    AsJson,
    CacheDir,
    CenterKeys,
    ColdKType,
    ColdVType,
    Debug,
    GroupSize,
    HotKeep,
    HotSize,
    KType,
    Preset,
    PromptFile,
    Rotate,
    Sample,
    Seed,
    SinkTokens,
    Threads,
    VType,
    parse_layers,
    watch_layouts,
)
from ...progress import Bars

if TYPE_CHECKING:
    from ..format import TraceHeader

_DEFAULT_PROMPT_TOKENS = 64


@one_line("trace")
def trace(
    save_gguf: Annotated[
        Path, typer.Option("--save-gguf", "-o", dir_okay=False, help="Where to write the trace.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder, a GGUF file, or a name on the Hugging Face hub (llama.cpp: a GGUF "
            "file). Default: SmolLM2-135M-Instruct, fetched through pip.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Who runs the model: transformers or llama.cpp.")
    ] = "transformers",
    layer: Annotated[
        str, typer.Option(help="Layers to record, such as 0 or 0,5,29 or 3-7; or all.")
    ] = "all",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: PromptFile = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the prompt to that many tokens. Without a prompt of one's own, prose out of "
            f"Python's language reference is read, {_DEFAULT_PROMPT_TOKENS} tokens by default.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("-n", "--steps", min=0, max=100_000, help="Decode steps.")
    ] = 4,
    seed: Seed = 0,
    sample: Sample = False,
    threads: Threads = None,
    k_type: KType = "f16",
    v_type: VType = "f16",
    mixed: Annotated[
        bool, typer.Option("--mixed-kv-cache", help="A hot and a cold tier, not a standard cache.")
    ] = False,
    cold_k_type: ColdKType = None,
    cold_v_type: ColdVType = None,
    preset: Preset = None,
    hot_size: HotSize = None,
    group_size: GroupSize = None,
    sink_tokens: SinkTokens = None,
    hot_keep: HotKeep = None,
    rotate: Rotate = None,
    center_keys: CenterKeys = None,
    second_mask: Annotated[
        bool,
        typer.Option("--second-mask", help="Store the mask of the cold part as its own tensor."),
    ] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Run a model and record its attention, layer by layer and step by step, into a GGUF file.

    One step for the prompt, one for each decoded token; of each layer the output, Q, K, V and the
    mask, with a mixed cache also the cold K and V. Check it with ``mixedkv verify``.
    """
    if engine not in ("transformers", "llama.cpp"):
        raise typer.BadParameter(
            f"must be transformers or llama.cpp, got {engine!r}", param_hint="--engine"
        )
    mixed = mixed or preset is not None
    known = {"-ctk": mkv.formats.available(), "--preset": presets.NAMES}
    types = {"--cold-k-type": cold_k_type, "--cold-v-type": cold_v_type}
    for option, value in {"-ctk": k_type, "-ctv": v_type, **types, "--preset": preset}.items():
        names = known.get(option, known["-ctk"])
        if value is not None and value not in names:
            raise typer.BadParameter(
                f"must be one of {', '.join(names)}, got {value!r}", param_hint=option
            )
    sizes = {"--hot-size": hot_size, "--group-size": group_size, "--sink-tokens": sink_tokens}
    kept = {"--hot-keep": hot_keep, "--center-keys": center_keys}
    for option, given in {**types, **sizes, **kept}.items():
        if given is not None and not mixed:
            raise typer.BadParameter("goes with --mixed-kv-cache", param_hint=option)
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("--prompt and --prompt-file: one of them", param_hint="--prompt")
    if second_mask and not mixed:
        raise typer.BadParameter("goes with --mixed-kv-cache", param_hint="--second-mask")
    if mixed and engine != "transformers":
        raise typer.BadParameter(
            "llama.cpp has no mixed cache; use --engine transformers", param_hint="--mixed-kv-cache"
        )
    if rotate and engine != "transformers":
        raise typer.BadParameter(
            "llama.cpp is not asked to rotate; use --engine transformers", param_hint="--rotate"
        )
    layers = parse_layers(layer)
    check_output(save_gguf, "--save-gguf")
    # Known before the model runs, not when the file is to be written.
    if importlib.util.find_spec("gguf") is None:
        need("gguf", "trace")
    watch_layouts(debug)
    set_threads(threads)
    # Read when tqdm is first imported. Where transformers reads GGUF it asks tqdm for bars by
    # itself, whatever its own switch says.
    os.environ.setdefault("TQDM_DISABLE", "1")

    from ... import models
    from .. import record, report, write_trace

    settings = record.Settings(
        layers=layers,
        steps=steps,
        mixed=mixed,
        k_type=k_type,
        v_type=v_type,
        preset=preset,
        cold_k_type=cold_k_type,
        cold_v_type=cold_v_type,
        hot_size=hot_size,
        group_size=group_size,
        sink_tokens=sink_tokens,
        hot_keep=hot_keep,
        rotate=rotate,
        center_keys=center_keys,
        second_mask=second_mask,
        sample=sample,
        seed=seed,
        threads=threads,
    )
    text = _prompt(prompt, prompt_file)
    most = prompt_tokens
    if most is None and prompt is None and prompt_file is None:
        most = _DEFAULT_PROMPT_TOKENS
    console = report.make_console(stderr=as_json)
    listener = None if as_json else partial(report.print_recorded, console)
    with Bars(Console(stderr=True)) as bars:
        bars.phase("recording", steps + 1)
        if engine == "llama.cpp":
            from .. import llamacpp

            path = models.fetch(folder=cache_dir) if model is None else Path(model)
            recording = llamacpp.record(
                path, text, settings, prompt_tokens=most, listener=listener, progress=bars
            )
        else:
            import mixedkv.integrations.transformers as mkt

            quiet_transformers()
            mkt.register()
            loaded = models.load(model, folder=cache_dir)
            tokens = list(loaded.tokenizer(text)["input_ids"])[:most]
            recording = record.record(
                loaded.model,
                tokens,
                settings,
                title=loaded.title,
                listener=listener,
                progress=bars,
            )
    tensors = sum(len(step.tensors) for step in recording.steps)
    with naming(save_gguf):
        write_trace(save_gguf, recording.header, recording.steps)
        size = save_gguf.stat().st_size
    if as_json:
        print_json(_words(recording.header, tensors, size, save_gguf))
    else:
        steps, held = len(recording.header.step_tokens), len(recording.header.layers)
        console.print(
            f"{tensors} tensors of {steps} {'step' if steps == 1 else 'steps'} and "
            f"{held} {'layer' if held == 1 else 'layers'}, {size / 2**20:.1f} MiB: "
            f"{printable(save_gguf)}",
            highlight=False,
            markup=False,
        )
        for name, cast in recording.header.notes.items():
            if name.startswith("cast_"):
                console.print(f"note: {name[-1].upper()} is {cast}: the trace holds the latter")


def _words(header: TraceHeader, tensors: int, size: int, path: Path) -> dict[str, Any]:
    return {
        "mixedkv": mkv.__version__,
        "file": str(path),
        "bytes": size,
        "engine": header.engine,
        "engine_version": header.engine_version,
        "model": header.model,
        "cache": header.cache,
        "tokens": header.tokens,
        "step_tokens": header.step_tokens,
        "layers": sorted(header.layers),
        "tensors": tensors,
        **header.notes,
    }


def _prompt(prompt: str | None, path: Path | None) -> str:
    if prompt is not None:
        if not prompt:
            raise ValueError("the prompt is empty")
        return prompt
    if path is not None:
        with naming(path):
            return path.read_text(encoding="utf-8", errors="replace")
    from ... import texts

    return texts.library_prose()
