"""From arguments to an answer on the standard output, and an exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from locallearn.command_line.checking import check
from locallearn.command_line.cutting import plan, stages
from locallearn.command_line.errors import said
from locallearn.command_line.parsing import parsed

_COMMANDS = {"stages": stages, "plan": plan, "check": check}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its arguments; by default those of the process.

    Returns:
        the exit status: 0, 1 if ``check`` found gradients that differ, 2 for a mistake, 130 if it was interrupted.
    """
    args = parsed(None if argv is None else list(argv))
    if args.version:
        from locallearn import __version__  # noqa: PLC0415 - the package may still be on its way

        sys.stdout.write(f"locallearn {__version__}\n")
        return 0
    if args.command is None:
        args.parser.error(f"say what to do: {', '.join(_COMMANDS)}; locallearn --help tells more")
    try:
        text, numbers, status = _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        return 130
    except Exception as problem:  # noqa: BLE001 - a backbone may raise anything, and 1 means that a gradient differs
        sys.stderr.write(f"locallearn {args.command}: error: {said(problem)}\n")
        return 2
    try:
        sys.stdout.write((json.dumps(numbers, indent=1) if args.json else text) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `locallearn stages ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
