"""The `upwell` command."""

from upwell.cli.main import main

__all__ = ["main"]
