"""The command `mixedkv`, also as ``python -m mixedkv``."""

from __future__ import annotations

import sys

_CLI_MODULES = ("typer", "rich", "click")


def main() -> None:
    """Run the command line; say which extra is missing where one is."""
    try:
        from .tools.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _CLI_MODULES:
            raise
        print(
            f"mixedkv: the command line needs {error.name}: pip install 'mixedkv[cli]' "
            "(or 'mixedkv[demo]')",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
