"""What every stage hands on for a batch, as one vector per image: in eval mode, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from locallearn._fitting.batches import View, rows, told
from locallearn._fitting.channels import agreed_axis
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.cuts import check_order, checked, hooked, submodules
from locallearn._walk.trees import called, mapped
from locallearn.testing.copies import replayed
from locallearn.wrapper import LocalWrapper

Pool = Callable[[Tensor], Tensor]


@contextmanager
def stage_vectors(model: LocalWrapper, pool: Pool | None) -> Iterator[Callable[[View], list[Tensor]]]:
    """While open, yields what reads a batch: every stage's vectors ``[(N, C_k), ...]``, from the lowest stage to the top.

    Afterwards modes, buffers and random state are as they were.

    Args:
        model: whose backbone runs, on the device where its weights are.
        pool: makes vectors ``(N, C)`` of what decoders read of an outlet; by default its mean over positions.

    Raises:
        TypeError: if the model is not wrapped.
        ValueError: where a batch is read, if ``pool`` makes no vectors, or if features are not finite.
    """
    check_wrapped(model)
    backbone, quiet = model.backbone, undisturbed(model.backbone)
    ends = submodules(backbone, model.stages)
    sizes = [weight.shape for weight in backbone.parameters()]
    device = next((weight.device for weight in backbone.parameters()), None)

    def read(images: View) -> list[Tensor]:
        found: list[Tensor] = []
        count = rows(images)
        ran: list[int] = []

        def keep(stage: int, output: object) -> object:
            ran.append(stage)
            outlet = model.features(checked(stage, model.stages[stage], output))
            vectors = averaged(outlet, sizes) if pool is None else pool(outlet)
            if vectors.ndim != 2 or (count is not None and len(vectors) != count):
                raise ValueError(
                    f"pool= makes vectors (N, C), one per image; for {count} images and the outlet of stage {stage}, of "
                    f"shape {tuple(outlet.shape)}, it returned shape {tuple(vectors.shape)}"
                )
            wrong = int((~vectors.detach().isfinite()).flatten(1).any(dim=1).sum())
            if wrong:
                raise ValueError(
                    f"the features of stage {stage}, which ends after {model.stages[stage]!r}, are not finite for {wrong} of "
                    f"{len(vectors)} images: look for nan or inf in the images, and in the weights up to there"
                )
            found.append(vectors.detach().clone())  # what follows may work in place
            return output

        hooks = hooked(ends, keep)
        with hooks, hooks, torch.no_grad():
            called(backbone, mapped(lambda tensor: tensor.detach().clone().to(device), images))
        check_order(model.stages, ran, backbone)
        return found

    with ExitStack() as stack:
        stack.enter_context(replayed())
        stack.enter_context(quiet)
        stack.enter_context(quiet)
        yield read


def averaged(outlet: Tensor, sizes: Sequence[torch.Size]) -> Tensor:
    """The mean over all positions of a map or of tokens, ``(N, C)``."""
    try:
        axis = agreed_axis(outlet, sizes)
    except ValueError as error:
        raise ValueError(
            f"which axis of an outlet of shape {tuple(outlet.shape)} holds the channels? Say how to make vectors of it, such as "
            "pool=lambda outlet: outlet.mean(dim=1)"
        ) from error
    return reduce(outlet, "n c ... -> n c" if axis == 1 else "n ... c -> n c", "mean")


def check_wrapped(model: object) -> None:
    """Checks that ``model`` is a wrapper.

    Raises:
        TypeError: otherwise.
    """
    if isinstance(model, LocalWrapper):
        return
    inner = isinstance(getattr(model, "module", None), LocalWrapper)
    advice = "Take what it wraps, `.module`" if inner else "Wrap it: LocalWrapper(backbone, stages=[...])"
    kind = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
    raise TypeError(f"stages are looked at in a LocalWrapper; got {kind}. {advice}")


def labelled(part: str, batches: Iterable[Any]) -> Iterator[tuple[View, Tensor]]:
    """The batches of ``part``, each images, or what else the backbone takes, and labels ``(N,)``.

    Raises:
        TypeError: for batches of another kind.
        ValueError: if labels are not one whole number per image, or if there is no batch.
    """
    empty = True
    for batch in batches:
        pair: Any = batch if isinstance(batch, Sequence) and len(batch) == 2 else (None, None)
        if not (isinstance(pair[0], Tensor | tuple | Mapping) and isinstance(pair[1], Tensor)):
            kinds = f" of {[type(x).__name__ for x in batch]}" if isinstance(batch, Sequence) else ""
            raise TypeError(
                f"{part} yields batches (images, labels), both tensors; got a {type(batch).__name__}{kinds}"
            )
        images, labels = pair
        count = rows(images)
        if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1 or count not in (None, len(labels)):
            raise ValueError(
                f"labels are one whole number per image; {part} has labels of shape {tuple(labels.shape)} and {labels.dtype} for "
                f"{told(images)}"
            )
        if len(labels):
            empty = False
            yield images, labels
    if empty:
        raise ValueError(f"{part} has no images. A generator that was used before is empty: make a new one")
