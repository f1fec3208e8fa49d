"""What the command line takes, and what it says to what it does not take."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from locallearn.command_line.backbones import FORMS
from locallearn.command_line.errors import nearest
from locallearn.decoders import ConvMLPDecoder, MLPDecoder, TokenDecoder

DECODERS = {"conv": ConvMLPDecoder, "tokens": TokenDecoder, "mlp": MLPDecoder}
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_EPILOG = """\
examples:
  locallearn stages torchvision:resnet50 --size 224
  locallearn plan timm:vit_small_patch16_224 --stages 4 --overlap 1 --budget 8GB --checkpoint
  locallearn check path/to/file.py:function --stages 3 --size 32
"""


class Parser(argparse.ArgumentParser):
    """Names what is nearest to what it does not know."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r".*invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, or a message and exit status 2."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        own: argparse.ArgumentParser = args.parser
        known = [option for action in own._actions for option in action.option_strings]
        advice = "".join(nearest(word.partition("=")[0], known) for word in unknown[:1])
        own.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return args


def _parser() -> Parser:
    parser = Parser(
        "locallearn",
        description="Where a backbone can be cut, how it is trained locally, and whether its gradients are right.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    stages = commands.add_parser(
        "stages", help="where a backbone can be cut", description="Where a backbone can be cut."
    )
    _what(stages, batch=64)
    _pictured(stages)

    plan = commands.add_parser(
        "plan",
        help="pick the cuts, and predict memory",
        description="Pick the cuts for the least memory, or for a budget.",
    )
    _what(plan, batch=64)
    _how(plan, plan, default=4)
    plan.add_argument(
        "--budget", type=memory, metavar="BYTES", help="most even computation that fits, such as 8GB or 500MB"
    )
    _pictured(plan)

    check = commands.add_parser(
        "check",
        help="compare gradients with plain autograd",
        description="Compare every gradient of a local pass with plain autograd's, in double precision, on random data.",
    )
    _what(check, batch=4, of="of each view")
    cuts = check.add_mutually_exclusive_group()
    _how(check, cuts)
    cuts.add_argument(
        "--at", nargs="+", metavar="NAME", help="the submodules after which stages end, instead of --stages"
    )
    check.add_argument("--views", type=whole, default=2, metavar="N", help="views of a batch (%(default)s)")
    check.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and data (%(default)s)")
    check.add_argument("--all", action="store_true", help="all parameters, not only the 20 that differ most")
    for command in (stages, plan, check):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(parser=command)
    parser.set_defaults(parser=parser)
    return parser


def _what(parser: argparse.ArgumentParser, batch: int, of: str = "all views together") -> None:
    add = parser.add_argument
    add("backbone", metavar="BACKBONE", help=FORMS)
    add("--size", type=whole, metavar="PIXELS", help="of a side of the images (what the backbone is made for, or 224)")
    add("--channels", type=whole, metavar="N", help="of the images (3)")
    add("--tokens", type=whole, metavar="N", help="give it N token numbers instead of images")
    add("--batch", type=whole, default=batch, metavar="N", help=f"inputs at once, {of} (%(default)s)")
    add("--decoder", choices=[*DECODERS], help="on the stages' outlets (the first of them that fits)")


def _how(parser: argparse.ArgumentParser, cuts: argparse._ActionsContainer, default: int | None = None) -> None:
    add = parser.add_argument
    # a default that is given again would not count as given beside --at
    cuts.add_argument("--stages", type=whole, default=default, metavar="N", help="how many (4)")
    add("--overlap", type=index, default=1, metavar="N", help="stages that neighbouring units share (%(default)s)")
    add("--checkpoint", action="store_true", help="recompute blocks in the backward")


def _pictured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="FILE.png", help="draw it, too")


def whole(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def index(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number of 64 bits, as torch takes it."""
    if not re.fullmatch(r"-?[0-9]+", text) or not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 64 bits, got {text!r}")
    return int(text)


def memory(text: str) -> float:
    """Bytes, as in ``8GB``, ``1.5GiB`` or ``8e9``."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-zA-Z]*)", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 8GB, 500MB or 1.5GiB, got {text!r}")
    return float(found[1]) * _UNITS[found[2].upper()]
