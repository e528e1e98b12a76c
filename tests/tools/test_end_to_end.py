"""`mixedkv bench --end-to-end`: who takes part, who is refused, what is printed. Nothing is timed.

The model is tiny and random; a clock that stands still would do.
"""

from __future__ import annotations

import importlib.metadata
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("platformdirs")

import mixedkv as mkv  # noqa: E402
import mixedkv.integrations.transformers as mkt  # noqa: E402
import typer  # noqa: E402
from mixedkv.tools import models  # noqa: E402
from mixedkv.tools.bench import command, plot, report  # noqa: E402
from mixedkv.tools.bench.end_to_end import PEERS, contenders, plan  # noqa: E402
from mixedkv.tools.bench.end_to_end.stopwatch import Stopwatch  # noqa: E402
from mixedkv.tools.bench.results import Faster, faster  # noqa: E402
from mixedkv.tools.progress import Progress  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

mkt.register()

VOCAB = 199
POSITIONS = 128
FIRST, F16 = "mixedkv mixed, 32 hot", "mixedkv f16"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Any:
    return torch.randint(2, VOCAB, (1, POSITIONS), generator=torch.Generator().manual_seed(0))


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append(title)

    def at(self, done: float, total: float, what: str = "") -> None:
        assert 0.0 <= done <= total


def small_plan(**changes: Any) -> plan.Plan:
    settings: dict[str, Any] = {
        "contexts": [64],
        "threads": [1],
        "rounds": 2,
        "steps": 3,
        "seconds": 0.0,
        "prefill_chunk": None,
    }
    return plan.Plan(**{**settings, **changes})


def run(model: Any, ids: Any, wanted: plan.Plan, field: contenders.Field) -> plan.Report:
    return plan.run(wanted, "tiny", model, ids, field)


def rows_of(found: plan.Report) -> dict[str, plan.Row]:
    (table,) = found.tables
    return {row.name: row for row in table.rows}


# --- attention apart ------------------------------------------------------------------------------


def test_stopwatch_gives_back_what_it_watched(model: Any, ids: Any) -> None:
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    cache = transformers.DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    stopwatch = Stopwatch()
    with torch.no_grad(), stopwatch.watching("sdpa", cache):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not function
        model(ids[:, :8], past_key_values=cache)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function
    assert "update" not in vars(cache)
    assert cache.get_seq_length() == 8
    assert stopwatch.take() > 0
    assert stopwatch.take() == 0


def test_stopwatch_keeps_a_function_of_the_users_own() -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with (
            pytest.raises(RuntimeError, match="broken"),
            Stopwatch().watching("sdpa", transformers.DynamicCache()),
        ):
            raise RuntimeError("broken")
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


# --- who takes part -------------------------------------------------------------------------------


def test_peers_that_are_missing_are_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(contenders.importlib.metadata, "version", missing)
    field = contenders.gather(model.config, ["quanto", "hqq"], 32)
    assert [one.name for one in field.contenders] == [FIRST, F16, "DynamicCache"]
    assert field.absent == {
        "quanto": "not installed: pip install optimum-quanto",
        "hqq": "not installed: pip install hqq",
    }
    assert set(field.versions) == {"mixedkv", "transformers"}


def test_peers_that_do_not_work_are_absent(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no\nsuch library")

    monkeypatch.setattr(contenders, "QuantizedCache", broken)
    field = contenders.gather(model.config, ["fp8"], 32)
    assert field.absent == {"fp8": "no such library"}


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 24])
def test_run_everything_once(model: Any, ids: Any, chunk: int | None) -> None:
    wanted = small_plan(contexts=[64, POSITIONS], prefill_chunk=chunk)
    threads = torch.get_num_threads(), mkv.get_num_threads()
    model.set_attn_implementation("sdpa")
    progress = Heard()
    field = contenders.gather(model.config, [], 32)
    found = plan.run(wanted, "tiny", model, ids, field, progress)
    assert found.wrong == []
    assert progress.phases == ["context 64, 1 thread", f"context {POSITIONS}, 1 thread"]
    # What was set before is set again.
    assert (torch.get_num_threads(), mkv.get_num_threads()) == threads
    assert model.config._attn_implementation == "sdpa"
    assert found.model["positions"] == POSITIONS
    assert [table.prompt for table in found.tables] == [64, POSITIONS - wanted.fed]
    for table in found.tables:
        assert (table.rounds, table.steps) == (2, 3)
        assert table.prefill_rounds == 1
        for row in table.rows:
            assert row.problem is None
            assert row.step is not None
            assert row.step >= row.step_best > 0  # type: ignore[operator]
            assert 0 < row.attention < row.step  # type: ignore[operator]
            assert 0 < row.prefill_attention < row.prefill  # type: ignore[operator]
            assert row.tokens_per_second == pytest.approx(1 / row.step_mean)  # type: ignore[operator]
            assert row.against == FIRST
        first, f16, reference = table.rows
        assert first.ratio == first.prefill_ratio == 1.0
        assert reference.kl is None
        for row in (first, f16):
            assert row.compared == wanted.fed
            assert row.kl is not None
        assert f16.kl < 1e-5  # type: ignore[operator]
        assert f16.top1 == 1.0


def test_run_times_no_wrong_cache(model: Any, ids: Any) -> None:
    field = contenders.gather(model.config, [], 32)
    first, f16, reference = field.contenders
    # Another attention than the cache's own: its keys are handles that nobody can read.
    broken = contenders.Contender("mixedkv", "broken", "sdpa", first.make_cache, 1.0)
    strict = contenders.Contender("someone", "strict", mkt.NAME, first.make_cache, -1.0)
    field = contenders.Field([first, f16, reference, broken, strict], {}, {})
    found = run(model, ids, small_plan(), field)
    rows = rows_of(found)
    assert rows["broken"].problem.startswith("RuntimeError")  # type: ignore[union-attr]
    assert rows["strict"].problem == "wrong: KL divergence above -1"
    assert rows["strict"].step is None
    assert rows[FIRST].step is not None
    # A peer's fault is not ours.
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith("broken, context 64, 1 thread: RuntimeError")
    assert report.render_whole(found.tables[0]) is not None


def test_run_goes_on_without_who_fails_midway(model: Any, ids: Any) -> None:
    class Fails(transformers.DynamicCache):  # type: ignore[misc]
        steps_left = 20

        def update(self, *args: Any, **kwargs: Any) -> Any:
            Fails.steps_left -= 1
            if Fails.steps_left < 0:
                raise MemoryError("too large\nand more")
            return super().update(*args, **kwargs)

    field = contenders.gather(model.config, [], 32)
    fails = contenders.Contender("someone", "fails", "sdpa", lambda tokens: Fails(), 1.0)
    for steps_left in (5, 8, 20, 30):  # warming up, reading, checking, decoding
        Fails.steps_left = steps_left
        found = run(model, ids, small_plan(), contenders.Field([*field.contenders, fails], {}, {}))
        rows = rows_of(found)
        assert rows["fails"].problem == "MemoryError: too large"
        assert rows["fails"].step is None
        assert rows[FIRST].ratio == 1.0
        assert rows["DynamicCache"].problem is None


def test_run_needs_the_reference(model: Any, ids: Any) -> None:
    field = contenders.gather(model.config, [], 32)
    field = contenders.Field(field.contenders[:1], {}, {})
    with pytest.raises(RuntimeError, match="DynamicCache could not run"):
        run(model, ids, small_plan(), field)


@pytest.mark.parametrize(("context", "rounds"), [(POSITIONS + 1, 1), (64, 1000)])
def test_run_refuses_what_the_model_has_no_positions_for(
    model: Any, ids: Any, context: int, rounds: int
) -> None:
    field = contenders.gather(model.config, [], 32)
    with pytest.raises(ValueError, match=rf"context of {context} .* {POSITIONS} positions"):
        run(model, ids, small_plan(contexts=[context], rounds=rounds), field)


def test_run_refuses_a_short_text(model: Any, ids: Any) -> None:
    field = contenders.gather(model.config, [], 32)
    with pytest.raises(ValueError, match="the text has 70 tokens, needed 78"):
        run(model, ids[:, :70], small_plan(), field)


# --- the command ----------------------------------------------------------------------------------

TABLE_KEYS = {
    "context": int,
    "prompt": int,
    "threads": int,
    "rows": list,
    "prefill_rounds": int,
    "rounds": int,
    "steps": int,
    "others_load": (float, type(None)),
    "faster": list,
    "prefill_faster": list,
}
_FIGURE = (float, type(None))
ROW_KEYS = {
    "peer": str,
    "name": str,
    "implementation": str,
    "tokens_per_second": _FIGURE,
    "ratio": _FIGURE,
    "against": (str, type(None)),
    "step": _FIGURE,
    "step_best": _FIGURE,
    "step_mean": _FIGURE,
    "attention": _FIGURE,
    "attention_mean": _FIGURE,
    "rest": _FIGURE,
    "prefill": _FIGURE,
    "prefill_ratio": _FIGURE,
    "prefill_attention": _FIGURE,
    "prefill_rest": _FIGURE,
    "kl": _FIGURE,
    "top1": _FIGURE,
    "compared": int,
    "problem": (str, type(None)),
}


def check_schema(found: dict[str, Any]) -> None:
    assert set(found) == {"task", "machine", "model", "peers", "absent", "tables"}
    assert found["task"] == "end-to-end"
    assert set(found["model"]) == {"title", "parameters", "dtype", "positions"}
    assert {"cpu", "threads", "mixedkv", "isa", "torch"} <= set(found["machine"])
    for table in found["tables"]:
        assert set(table) == set(TABLE_KEYS)
        for key, kind in TABLE_KEYS.items():
            assert isinstance(table[key], kind), key  # type: ignore[arg-type]
        for row in table["rows"]:
            assert set(row) == set(ROW_KEYS)
            for key, kind in ROW_KEYS.items():
                assert isinstance(row[key], kind), key  # type: ignore[arg-type]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, model: Any) -> Callable[..., Any]:
    """Call `mixedkv bench` with arguments; what it loads is the tiny model."""

    def tokenizer(text: str, return_tensors: str) -> Any:
        codes = torch.tensor([[2 + ord(character) % (VOCAB - 2) for character in text[:50]]])
        return types.SimpleNamespace(input_ids=codes)

    def load(name: str | None, progress: Progress) -> models.LoadedModel:
        progress.at(1, 2)
        return models.LoadedModel(name or "tiny", model, tokenizer)

    monkeypatch.setattr(models, "load", load)
    app = typer.Typer()
    app.command()(command.bench)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


TINY_RUN = ("--end-to-end", "--kv", "64", "--threads", "1", "--rounds", "1", "--steps", "2")
TINY_RUN += ("--seconds", "0", "--hot-size", "32")


def test_command_prints_tables(bench: Callable[..., Any]) -> None:
    done = bench(*TINY_RUN, "--peers", "none")
    assert done.exit_code == 0, done.output
    for words in ("decode: context 64, 1 thread", "prefill: 64 tokens", FIRST, "DynamicCache"):
        assert words in done.stdout


def test_command_json_is_one_object(bench: Callable[..., Any]) -> None:
    """Whoever is installed runs; whoever is not is named with the way to get it."""
    done = bench(*TINY_RUN, "--json", "--model", "mine", "--prefill-chunk", "16")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    check_schema(found)
    assert found["model"]["title"] == "mine"
    names = {row["name"].rpartition(" ")[2] for row in found["tables"][0]["rows"]}
    assert names & set(PEERS) | set(found["absent"]) == set(PEERS)


def test_command_plots(bench: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench(*TINY_RUN, "--peers", "none", "--plot", tmp_path / "figure.svg")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1


def test_command_fails_where_mixedkv_is_wrong(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "_MOST_KL_F16", -1.0)
    done = bench(*TINY_RUN, "--peers", "none", "--json")
    assert done.exit_code == 1
    assert "WRONG" in done.stderr
    check_schema(json.loads(done.stdout))
    done = bench(*TINY_RUN, "--peers", "none")
    assert done.exit_code == 1
    assert "WRONG" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "4"), "--steps"),
        (("--hot-size", "64"), "--hot-size"),
        (("--prefill-chunk", "64"), "--prefill-chunk"),
        (("--end-to-end", "--only", "decode"), "--only"),
        (("--end-to-end", "--build-ggml"), "--build-ggml"),
        (("--end-to-end", "--peers", "ggml"), "ggml"),
        (("--end-to-end", "--hot-size", "33"), "multiple of 32"),
        (("--end-to-end", "--model", "a", "--model", "b"), "one model"),
        (("--end-to-end", "--kv", "0"), "--kv"),
    ],
    ids=" ".join,
)
def test_command_wrong_use(bench: Callable[..., Any], arguments: Any, says: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr.replace("\n", " ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seconds", "inf"), "--seconds"),
        (("--plot", "/proc/figure.png"), "--plot"),
        (("--hot-size", "33"), "multiple of 32"),
        (("--peers", "ggml"), "ggml"),
    ],
    ids=" ".join,
)
def test_command_refuses_in_one_line(bench: Callable[..., Any], arguments: Any, says: str) -> None:
    done = bench("--end-to-end", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("mixedkv: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_command_refuses_a_cache_beyond_memory(bench: Callable[..., Any]) -> None:
    """Before anyone runs, and not as a fault of mixedkv's."""
    done = bench(*TINY_RUN[:-1], 32 * 10**12, "--peers", "none")
    assert isinstance(done.exception, MemoryError)  # one_line's to print
    assert "hot_size=32000000000000" in str(done.exception)
    assert "GiB" in str(done.exception)


def test_faster_ones() -> None:
    table = example().tables[0]
    mixed, row, _ = table.rows
    row.ratio, row.prefill_ratio = 0.75, 1.5
    found = faster((one, one.ratio) for one in table.rows)
    assert found == [Faster(row.name, FIRST, 0.75)]
    assert faster((one, one.prefill_ratio) for one in table.rows) == []
    mixed.peer = "mixedkv"
    mixed.ratio = 0.5
    assert faster([(mixed, mixed.ratio)]) == []


def test_prompt_is_repeated_where_it_is_short(model: Any) -> None:
    def tokenizer(text: str, return_tensors: str) -> Any:
        return types.SimpleNamespace(input_ids=torch.arange(30)[None])

    ids = plan.text_of(tokenizer, small_plan(), POSITIONS)
    assert ids.shape == (1, 64 + small_plan().fed)
    assert ids[0, 30:33].tolist() == [0, 1, 2]


# --- what is printed ------------------------------------------------------------------------------


def example() -> plan.Report:
    row = plan.Row(peer="hqq", name="QuantizedCache quanto", implementation="sdpa")
    row.tokens_per_second, row.ratio, row.against = 1234.5, 123.45, FIRST
    row.step = row.step_best = row.step_mean = row.attention = row.rest = 0.1234
    row.prefill = row.prefill_attention = row.prefill_rest = 123.45
    row.prefill_ratio, row.kl, row.top1 = 123.45, 1.2e-3, 1.0
    mixed = plan.Row(peer="mixedkv", name="mixedkv mixed, 1024 hot", implementation="mixedkv")
    mixed.tokens_per_second, mixed.ratio, mixed.against = 12.3, 1.0, FIRST
    wrong = plan.Row(peer="mixedkv", name=F16, implementation="mixedkv")
    wrong.problem = "wrong: KL divergence above 0.001"
    table = plan.Table(context=8192, prompt=8056, threads=64, rows=[mixed, row, wrong])
    table.prefill_rounds, table.rounds, table.steps, table.others_load = 1, 16, 8, 1.5
    table.faster = [Faster("DynamicCache", FIRST, 0.123)]
    machine = {"mixedkv": "1", "isa": "scalar", "cpu": "a CPU", "threads": 64}
    model = {"title": "tiny", "parameters": 1e6, "dtype": "float32", "positions": POSITIONS}
    return plan.Report(
        machine=machine,
        model=model,
        peers={"mixedkv": "1"},
        absent={"fp8": "not [here]"},
        tables=[table],
    )


def test_tables_fit_80_columns() -> None:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        report.print_whole(example(), console)
    text = capture.get()
    lines = [line for line in text.splitlines() if "quanto" in line]
    assert len(lines) == 2
    assert not any("…" in line for line in text.splitlines())
    for words in ("1234.5", "123.45", "1.2e-03", "100 %", "WRONG", "1.5 CPUs", "fp8: not [here]"):
        assert words in text
    flat = " ".join(text.split())
    assert f"faster than mixedkv in decode: DynamicCache (0.12 of {FIRST})" in flat


def test_plot_of_rows_with_and_without_times(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.save_whole(example(), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1
