"""The command line: `simmim pretrain|describe|config|...`. Commands are in `app.py`, what they compose beside it."""

import sys


def main() -> None:
    """Entry point of `simmim` and of `python -m simmim_scale`."""
    from simmim_scale.cli.app import app

    sys.exit(app())


__all__ = ["main"]
