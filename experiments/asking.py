"""What the commands that ask a model a question have in common: how its pictures are made, and how a run ends."""

import argparse
import sys
from collections.abc import Callable

import torch

from mrflow.errors import MrflowError


def add_making(parser: argparse.ArgumentParser) -> None:
    """Options of native and staged sampling, and of the machine."""
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--steps", type=int, default=24, help="of native sampling (default: 24)")
    parser.add_argument("--few", type=int, default=12, help="of the staged low stage (default: 12)")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of the processor")
    parser.add_argument("--device", default="cpu")


def exit_code(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run, on so many threads as `args.threads` says if it does; what cannot be done is one line and an exit code."""
    if threads := getattr(args, "threads", None):
        torch.set_num_threads(threads)
    try:
        run(args)
    except MrflowError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
