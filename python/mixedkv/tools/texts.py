"""Long texts that are at hand everywhere."""

from __future__ import annotations

from pydoc_data.topics import topics

# The chapters of the language reference that read as prose, most readable first; the rest of the
# topics are tables, grammars and lists.
_PROSE = (
    "execmodel",
    "objects",
    "import",
    "naming",
    "types",
    "customization",
    "attribute-access",
    "compound",
    "assignment",
    "typesseq",
    "comparisons",
    "specialnames",
)


def library_prose() -> str:
    """Give English prose that every Python carries: chapters of its language reference.

    Two to three hundred thousand characters; the wording differs a little from one version of
    Python to the next.
    """
    chapters = [topics[name].strip() for name in _PROSE if name in topics]
    return "\n\n".join(chapters)
