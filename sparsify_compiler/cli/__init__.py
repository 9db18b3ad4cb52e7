"""The command line `sparsify-compiler`: verbs, their options, what they print."""

from sparsify_compiler.cli.main import main

__all__ = ["main"]
