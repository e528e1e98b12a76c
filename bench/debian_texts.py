"""English texts that docs/fidelity.md measures on, out of two Debian packages.

    apt-get download r-cran-janeaustenr debian-handbook
    python bench/debian_texts.py r-cran-janeaustenr_*.deb debian-handbook_*.deb --to texts/

writes six novels (emma.txt, persuasion.txt, ...) and the handbook's prose (debian-handbook.txt).
Needs dpkg-deb.
"""

from __future__ import annotations

import argparse
import html.parser
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
_LEAST_CHARACTERS = 120
"""Of a paragraph: shorter ones are headings, links and items of lists."""


def novels(data: bytes) -> Iterator[tuple[str, str]]:
    """Give (title, text) of each novel in R's data file."""
    while data:  # an object: its length, then a zlib stream of R's serialisation
        unpacked = zlib.decompressobj()
        raw = unpacked.decompress(data[4:])
        data = unpacked.unused_data
        lines, end = [], 0
        for match in re.finditer(rb"\x00\x04\x00\x09(....)", raw, re.DOTALL):
            if match.start() >= end:  # the tag of a string, and its length
                end = match.end() + struct.unpack(">i", match[1])[0]
                lines.append(raw[match.end() : end].decode())
        yield lines[0].strip(), "\n".join(lines) + "\n"


class _Paragraphs(html.parser.HTMLParser):
    """What a page says, without code, a blank line between its parts."""

    _SILENT = ("head", "pre", "script", "style")
    _PARTS = ("div", "h1", "h2", "h3", "h4", "li", "p")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in self._SILENT
        if tag in self._PARTS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self._SILENT

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def prose(folder: Path) -> str:
    """Give the paragraphs of a folder of HTML pages, in the order of the pages' names."""
    found = []
    for page in sorted(folder.glob("sect.*.html")):
        parser = _Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        paragraphs = re.split(r"\n\s*\n", "".join(parser.parts))
        found += [" ".join(paragraph.split()) for paragraph in paragraphs]
    return "\n\n".join(each for each in found if len(each) > _LEAST_CHARACTERS) + "\n"


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for package in given.packages:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
            root = Path(folder)
            if (root / _NOVELS).is_file():
                for title, text in novels((root / _NOVELS).read_bytes()):
                    name = title.lower().replace(" ", "-")
                    (given.to / f"{name}.txt").write_text(text, encoding="utf-8")
            if (root / _HANDBOOK).is_dir():
                path = given.to / "debian-handbook.txt"
                path.write_text(prose(root / _HANDBOOK), encoding="utf-8")


if __name__ == "__main__":
    main()
