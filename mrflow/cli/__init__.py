"""The command line: one file a group of verbs, parsing, and what is shown."""

from mrflow.cli.app import main as main
