"""The `fastdiff` command: one module of `fastdiff.commands` a subcommand, imported when run."""

from __future__ import annotations

import argparse
import importlib
import sys

from .version import __version__

PURPOSE = "Sample from, train and distil diffusion models."
COMMANDS = {
    "sample": "draw images from a trained model",
    "train": "train a model from a recipe",
    "distill": "distil a model into students that take few steps",
    "evaluate": "measure how good a model's images are, beside real ones",
    "verify": "check a folder of samples: every shard, whole and of one set",
    "export": "write the samples of a folder as PNG files",
    "doctor": "say what runs here, what is missing and what that costs",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return its status: 0 done, 1 refused, 2 misused, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastdiff", description=PURPOSE)
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        # only the module that will run is imported: `fastdiff --help` answers at once
        module = importlib.import_module(f"fastdiff.commands.{name}") if name in argv[:1] else None
        subparser = subparsers.add_parser(
            name, help=summary, description=getattr(module, "__doc__", None)
        )
        if module:
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"fastdiff {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return 130
