"""Backbones by name: ``torchvision:NAME``, ``timm:NAME``, ``hf:CONFIG`` or ``path/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.command_line.errors import CommandError, nearest

FORMS = "torchvision:NAME, timm:NAME, hf:CONFIG or path/file.py:function"


class Backbone(NamedTuple):
    """A backbone with random weights.

    Attributes:
        model: itself.
        code: the expression that makes it, to paste.
        size: pixels of a side of the images that it is made for, if it says so.
        channels: of those images.
    """

    model: nn.Module
    code: str
    size: int | None = None
    channels: int = 3


def load(name: str, size: int | None) -> Backbone:
    """The backbone that ``name`` names, made for images of ``size`` pixels where it has to know.

    Raises:
        CommandError: if there is none, if its package is not installed, or if it cannot be made.
    """
    kind, _, rest = name.partition(":")
    if kind in _KINDS and rest:
        return _KINDS[kind](rest, size)
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _of_file(Path(path), function)
    advice = nearest(kind, _KINDS) if ":" in name else f"; for torchvision's, write torchvision:{name}"
    if name.endswith(".py"):
        advice = f"; which function of it? Write {name}:function"
    raise CommandError(f"a backbone is {FORMS}; got {name!r}{advice}")


def batch(args: Any, backbone: Backbone) -> Tensor:
    """As many random inputs as ``--batch`` says: images, or tokens where ``--tokens`` says how many."""
    if args.tokens:
        return torch.zeros(args.batch, args.tokens, dtype=torch.long)
    size = args.size or backbone.size or 224
    return torch.rand(args.batch, args.channels or backbone.channels, size, size)


def _package(kind: str, package: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise CommandError(f"{kind}:NAME needs {install}, which is not installed: pip install {install}") from error


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        raise CommandError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} returns a backbone, an nn.Module; it returned {type(model).__name__}")
    return model


def _of_torchvision(name: str, size: int | None) -> Backbone:
    models = _package("torchvision", "torchvision.models", "torchvision")
    known = models.list_models()
    if name not in known:
        raise CommandError(f"torchvision has no model {name!r}{nearest(name, known)}")
    extra = {"image_size": size} if name.startswith("vit_") and size else {}
    extra |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    code = "".join(f", {key}={value!r}" for key, value in extra.items())
    made = _made(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **extra))
    return Backbone(made, f'torchvision.models.get_model("{name}"{code})')


def _of_timm(name: str, size: int | None) -> Backbone:
    timm = _package("timm", "timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise CommandError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    sized = f", img_size={size}" if size else ""

    def make() -> nn.Module:
        nonlocal sized
        try:
            made: nn.Module = timm.create_model(name, **({"img_size": size} if size else {}))
        except TypeError:  # one that takes images of any size
            sized, made = "", timm.create_model(name)
        return made

    model = _made(f"timm:{name}", make)
    channels, height, *_ = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224))
    return Backbone(model, f'timm.create_model("{name}"{sized})', height, channels)


def _of_transformers(name: str, size: int | None) -> Backbone:
    transformers = _package("hf", "transformers", "transformers")
    known = transformers.CONFIG_MAPPING
    if name not in known and not Path(name).exists() and "/" not in name:
        raise CommandError(f"transformers has no configuration {name!r}{nearest(name, known.keys())}")

    made = "for_model" if name in known else "from_pretrained"

    def make() -> nn.Module:
        config = getattr(transformers.AutoConfig, made)(name)
        if size and hasattr(config, "image_size"):
            config.image_size = size
        model: nn.Module = transformers.AutoModel.from_config(config)
        return model

    model = _made(f"hf:{name}", make)
    config: Any = model.config
    side = getattr(config, "image_size", None)
    sized = f", image_size={size}" if size and side == size else ""
    code = f'AutoModel.from_config(AutoConfig.{made}("{name}"{sized}))'
    return Backbone(model, code, side if isinstance(side, int) else None, getattr(config, "num_channels", 3))


def _of_file(path: Path, function: str) -> Backbone:
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # it may import what lies beside it, as when it is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    make = getattr(module, function, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CommandError(
            f"{path} has no function {function!r} that returns a backbone; it has {known}{nearest(function, known)}"
        )
    model = make if isinstance(make, nn.Module) else _made(f"{path}:{function}()", make)
    return Backbone(model, function if model is make else f"{function}()")


_KINDS: dict[str, Callable[[str, int | None], Backbone]] = {
    "torchvision": _of_torchvision,
    "timm": _of_timm,
    "hf": _of_transformers,
}
