"""How a script that trains runs and ends: what goes wrong is one line, said by one process, and an exit status."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

from command_line import Parser
from inputs.images import DataError

from locallearn.diagnosis import DivergedError
from pretraining.processes import Processes


def status_of(arguments: Parser, run: Callable[[argparse.Namespace, list[str]], int], argv: list[str] | None) -> int:
    """Call `run` with the parsed arguments and as they were given; returns the script's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # a step that the scaler skips, as fp16's first ones often are, is none of the optimiser's
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before", category=UserWarning)
    args = arguments.parse_args(argv)
    try:
        return run(args, argv)
    except (DataError, DivergedError) as problem:
        message = str(problem)
    except OSError as problem:
        message = f"cannot read or write {problem.filename or args.out}: {problem.strerror or problem}"
    except KeyboardInterrupt:
        print("\nstopped; --resume auto goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    if Processes.of_torchrun().leads:  # it says it for all
        arguments.error(message)
    return 2
