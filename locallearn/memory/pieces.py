"""What each piece of a backbone costs by itself, counted under fake tensors: what predictions are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from locallearn._fitting.attach import FromOutlet, attach
from locallearn._fitting.chain import Link, links
from locallearn._fitting.features import Features
from locallearn._fitting.outlets import Outlet, agreed_axis
from locallearn._fitting.recomputed import Policy, natural, runs
from locallearn._walk.cuts import hooked
from locallearn._walk.gradients import Accumulate
from locallearn._walk.recompute import Run, recomputed
from locallearn._walk.replay import Learnt
from locallearn._walk.segment import Flow, Segment, cut
from locallearn._walk.trees import called, mapped, tensors
from locallearn.memory.count import Flops, LiveBytes
from locallearn.plan import Plan, Unit
from locallearn.sharing import Hard


class Piece(NamedTuple):
    """A block, or a run of simple layers, between two places where a backbone can be cut. Sizes are in bytes.

    Attributes:
        end: the submodule after which it ends.
        shape: of its outlet.
        flops: of its forward.
        outlet: size of its outlet.
        kept: what its graph keeps alive after the forward, the outlet included and the inlet not.
        forward: the most that is alive during its forward, beside what was before.
        pull: likewise during a backward to the inlet only, which retains the graph; with the gradient that comes in.
        push: likewise during the last backward, to weights and inlet.
        train: the most that a decoder on its outlet takes from its forward to the end of its backward, beside the outlet;
            infinite where the decoder does not fit.
        decoder_flops: of that decoder's forward.
        weights: how many numbers are trained in it.
    """

    end: str
    shape: torch.Size
    flops: int
    outlet: int
    kept: int
    forward: int
    pull: int
    push: int
    train: float
    decoder_flops: int
    weights: int


def places(model: nn.Module, batch: Any, checkpoint: Policy) -> list[Link]:
    """Where a stage of ``model`` may end: after a block or a run of simple layers, up to the last map of features.

    What follows that map (pooling, a classifier) is left out, as is a place inside of what ``checkpoint`` recomputes.
    """
    chain = links(model, batch)
    whole = [run[0] for run in runs(model, (), checkpoint, batch)]
    together = {run[-1]: run for run in natural(model, (), chain)}
    inside = {name for run in together.values() for name in run[:-1]}
    cuttable = [link for link in chain if not any(link.end.startswith(f"{outer}.") for outer in whole)]
    maps = [link for link in cuttable if len(link.shape) > 2 and _positions(link.shape) > 1]
    if not maps:
        return [link for link in cuttable if link.block not in inside]
    _check_head(model, maps[-1], chain, batch)
    body = cuttable[: cuttable.index(maps[-1])]
    return [*(link for link in body if link.block not in inside), maps[-1]]  # a run may go on with the pooling


def _check_head(model: nn.Module, last: Link, chain: Sequence[Link], batch: Any) -> None:
    """Checks that what follows the last map is a head: pooling and what comes after it, or vectors.

    A layer with weights that makes the map a single position, in place of a pooling, is a part of the backbone, as is what
    follows it: the inputs are too small.
    """
    lost: list[Link] = []
    for link in chain[chain.index(last) + 1 :]:
        if len(link.shape) <= 2 or not (lost or _trained(model, link)):
            break
        if _trained(model, link):
            lost.append(link)
    if lost:
        inputs = ", ".join(str(tuple(tensor.shape[1:])) for tensor in tensors(batch))
        raise ValueError(
            f"stages are looked for up to the last map of features, which is that of {last.end!r} for inputs of shape "
            f"{inputs}: {tuple(last.shape[1:])}. What follows would not be trained: "
            f"{[link.end for link in lost]}, {sum(_trained(model, link) for link in lost):,} weights. Give larger inputs "
            f"(example=), or name the stages yourself: stages=[..., {lost[-1].end!r}]"
        )


def _trained(model: nn.Module, link: Link) -> int:
    return sum(weight.numel() for weight in model.get_submodule(link.block).parameters() if weight.requires_grad)


def _positions(shape: torch.Size) -> int:
    """Of a feature map, or tokens: all that is neither batch nor channels, whichever axis those have."""
    return shape[1:].numel() // max(shape[1], shape[-1])


def weigh(
    model: nn.Module,
    batch: Any,
    ends: Sequence[Link],
    decoder: Callable[[int], nn.Module] | None,
    axis: int | None,
    recompute: Mapping[Run, Learnt] = MappingProxyType({}),
    features: Features | None = None,
    attached: Mapping[int, Sequence[nn.Module]] = MappingProxyType({}),
) -> list[Piece]:
    """Cuts ``model``, a fake copy, at all of ``ends`` and runs every piece forward and backward by itself.

    Of several decoders on a piece, those of ``attached`` to it, the one that takes most counts. Without any, ``train`` and
    ``decoder_flops`` are 0.
    """
    pieces: list[Piece] = []
    live, flops = LiveBytes(), Flops()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    read = features or Features()
    inlets: list[Tensor] = []
    before, counted = 0, 0  # bytes, FLOPs

    def weighed(stage: int, output: Any) -> Any:
        nonlocal inlets, before, counted
        start = min(live.history[before:])  # once the frames of the piece below have let go of its inlet
        forward, kept, spent = max(live.history[before:]) - start, live.history[-1] - start, flops.total - counted
        size = sum(storage.nbytes() for storage in _storages(output))
        pull, push, weights = _backward(live, output, inlets)
        shown = read(output).detach()
        at = agreed_axis(shown, [weight.shape for weight in model.parameters()]) if axis is None else axis
        takes, decoding = (0.0, 0) if decoder is None else _train(shown, decoder, at)
        for module in attached.get(stage, ()):
            given = cut(output, differentiable=False)[1] if isinstance(module, FromOutlet) else shown
            takes, decoding = max((takes, decoding), train(module, given))
        sizes = (size, kept, forward, max(pull - start, kept), push - start, takes)
        pieces.append(Piece(ends[stage].end, shown.shape, spent, *sizes, decoding, weights))
        inlets, handed_on = cut(output, differentiable=True)
        before, counted = len(live.history) - 1, flops.total
        return handed_on

    with ExitStack() as stack:
        concerned = stack.enter_context(hooked([model.get_submodule(end.end) for end in ends], weighed))
        stack.enter_context(recomputed(model, recompute, concerned))
        stack.enter_context(flops)
        stack.enter_context(live)
        called(model, batch)
    return pieces


def _peak(live: LiveBytes, what: Callable[[], object]) -> int:
    start = len(live.history) - 1
    what()
    return max(live.history[start:])


def _storages(outlet: Any) -> list[torch.UntypedStorage]:
    """The memory behind the tensors in ``outlet``, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors(outlet)]
    return list({storage._cdata: storage for storage in storages}.values())


def _backward(live: LiveBytes, outlet: Any, inlets: Sequence[Tensor]) -> tuple[int, int, int]:
    """The peaks of a backward to the inlets and of the last one, and how many numbers are trained."""
    segment, pull = Segment(outlet, inlets), 0

    def ones() -> Flow:
        return [torch.ones_like(tensor) for tensor in segment.outlets]

    if inlets:
        pull = _peak(live, lambda: segment.pull(ones(), retain=True))

    def last() -> None:
        if segment.outlets:
            roots, gradients = segment.start(ones())
            Accumulate().push(roots, segment.weights, inlets, gradients)

    return pull, _peak(live, last), sum(weight.numel() for weight in segment.weights)


def _train(features: Tensor, decoder: Callable[[int], nn.Module], axis: int) -> tuple[float, int]:
    def there(width: int) -> nn.Module:
        """With its weights replaced, where ``Module.to`` would exchange them, which fake tensors do not take."""
        made = decoder(width)
        for part in made.modules():
            for name, weight in part._parameters.items():
                if weight is not None and weight.is_floating_point():
                    part._parameters[name] = nn.Parameter(weight.detach().to(features), weight.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    dtype = features.dtype if buffer.is_floating_point() else buffer.dtype
                    part._buffers[name] = buffer.to(features.device, dtype)
        return made

    try:
        (module,) = attach(there, Plan(1, [Unit(0, 0)]), Hard(), [Outlet(features, None)], axis)
    except ValueError:
        return inf, 0
    return train(module, features)


def train(decoder: nn.Module, features: Any) -> tuple[int, int]:
    """The most bytes that a decoder on ``features``, detached, takes beside them, and the FLOPs of its forward."""
    spent = 0
    for weight in decoder.parameters():
        weight.grad = torch.zeros_like(weight)
    begun = mapped(lambda tensor: tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex()), features)
    inlets, read = cut(begun, differentiable=True)
    with Flops() as flops, LiveBytes() as live:
        outputs = tree_leaves(decoder(read))
        del read
        spent = flops.total
        root = torch.stack([output.square().sum() for output in outputs if isinstance(output, Tensor)]).sum()
        del outputs
        Accumulate().push(root, list(decoder.parameters()), inlets)
    return max(live.history), spent
