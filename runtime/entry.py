"""Command ee: one entry point over all commands, `ee run` for `ee-run`; shells complete it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import click


class Program(NamedTuple):
    """A command: where its function is, as "module:function", and what it does."""

    function: str
    does: str


# In the order in which a user meets them; a test compares the functions with pyproject's.
PROGRAMS = {
    "train": Program("offramp.training.cli:train", "train a network with exits"),
    "eval": Program("offramp.training.cli:evaluate", "measure exits, policy and rules of a checkpoint"),
    "compare": Program("offramp.benchmarks.compare.cli:main", "train and measure several methods"),
    "split": Program("offramp.export.cli:main", "split a checkpoint into a bundle of segments"),
    "calibrate": Program("offramp.runtime.tuning.calibrate:main", "measure or guarantee operating points"),
    "run": Program("offramp.runtime.cli:main", "answer every line of a file"),
    "serve": Program("offramp.runtime.serving.cli:main", "answer over HTTP"),
    "bench": Program("offramp.runtime.tuning.bench:main", "measure what early exit saves on this machine"),
    "inspect": Program("offramp.runtime.inspect_cli:main", "show what a bundle is"),
    "verify": Program("offramp.export.trt_compile:main", "check a bundle, and compile it for TensorRT"),
    "sign": Program("offramp.export.sign:main", "sign a bundle, or make a key"),
    "push": Program("offramp.runtime.hub.push:main", "push a bundle to a model hub"),
    "export-triton": Program("offramp.export.triton_repository:main", "write a model repository for Triton"),
}


class Programs(click.Group):
    """The commands, each imported when it is asked for: most of them need an extra."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the commands."""
        return list(PROGRAMS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a name; one that says what is missing if its extra is not installed."""
        if name not in PROGRAMS:
            return None
        module, _, function = PROGRAMS[name].function.partition(":")
        try:
            command = getattr(import_module(module), function)
        except ImportError as problem:
            return _missing(name, problem)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write names and tasks, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, program.does) for name, program in PROGRAMS.items()])


def _missing(name: str, problem: ImportError) -> click.Command:
    @click.command(name, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("words", nargs=-1)
    def command(words: Sequence[str]) -> None:
        raise click.ClickException(f"ee {name}: {problem}; docs/install.md lists what each command needs")

    return command


@click.command(cls=Programs)
def main() -> None:
    """Transformers that stop early: train with exits, split into ONNX segments, run, serve.

    `ee NAME --help` describes a command; each is also a program of its own, ee-NAME.
    """


if __name__ == "__main__":
    main()
