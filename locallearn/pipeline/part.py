"""One rank's stages, run by themselves: block by block, or by the backbone's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from locallearn._walk.cuts import check_order, hooked, submodules
from locallearn._walk.hooks import has_hooks
from locallearn._walk.trees import called
from locallearn.pipeline.share import Share

OnInlet: TypeAlias = Callable[[], Any]  # what the lowest stage reads, as soon as it does
OnOutlet: TypeAlias = Callable[[int, Any], Any]  # (stage, outlet) -> what goes on to the next stage


class Chain:
    """Stages of nested ``nn.Sequential`` modules, whose children are called one after the other.

    Args:
        blocks: for each of the rank's stages, what it is made of.
        behind: what runs after the last cut, without being trained, if it is to.
        share: the rank's stages.
    """

    needs_inputs = False

    def __init__(self, blocks: list[list[nn.Module]], behind: list[nn.Module], share: Share) -> None:
        self._blocks, self._behind, self._share = blocks, behind, share

    def run(self, inputs: Any, on_inlet: OnInlet, on_outlet: OnOutlet) -> None:
        """Runs the stages from the inlet on; ``inputs`` are of no use here."""
        x: Any = on_inlet()
        for stage, blocks in zip(self._share.stages, self._blocks, strict=True):
            for block in blocks:
                x = block(x)
            x = on_outlet(stage, x)
        with torch.no_grad():
            for block in self._behind:
                x = block(x)


def chain(backbone: nn.Module, cuts: Sequence[str], share: Share, *, to_the_end: bool) -> Chain | None:
    """The stages as a chain, if the backbone is one.

    Args:
        backbone: the whole.
        cuts: after which its stages end.
        share: the rank's.
        to_the_end: whether what lies behind the last cut runs too.
    """
    pieces = list(_pieces("", backbone, set(cuts)))
    ends = [max((at for at, (name, _) in enumerate(pieces) if _within(name, cut)), default=-1) for cut in cuts]
    if ends != sorted(set(ends)) or ends[0] < 0:
        return None
    begins = [0, *(end + 1 for end in ends)]
    blocks = [[block for _, block in pieces[begins[s] : ends[s] + 1]] for s in share.stages]
    return Chain(blocks, [block for _, block in pieces[begins[-1] :]] if to_the_end else [], share)


def _within(name: str, cut: str) -> bool:
    return name == cut or name.startswith(f"{cut}.")


def _pieces(name: str, module: nn.Module, cuts: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """What is called one after the other, as coarse as the cuts allow."""
    cut_inside = not name or any(cut.startswith(f"{name}.") for cut in cuts)
    if not cut_inside:
        yield name, module
    elif type(module).forward is nn.Sequential.forward and not has_hooks(module):
        for child, part in module.named_children():
            yield from _pieces(f"{name}.{child}" if name else child, part, cuts)
    else:
        yield f"{name}?", module  # no cut ends here


class OwnForward:
    """The backbone's own forward: without numbers below the rank's inlet, and left above its outlet.

    Below the inlet everything is on the meta device, where operations tell shapes and compute nothing. What depends on the
    inputs alone (a padding mask) has numbers all the same, if the rank is given them.

    Args:
        backbone: whose weights below and above are on the meta device.
        cuts: the names of the stages' last modules.
        share: the rank's stages.
        device: where its inlet lies.
        to_the_end: whether what lies behind the last cut runs too, without being trained.
    """

    needs_inputs = False

    def __init__(
        self, backbone: nn.Module, cuts: Sequence[str], share: Share, device: torch.device, *, to_the_end: bool
    ) -> None:
        self._backbone, self._share, self._device, self._to_the_end = backbone, share, device, to_the_end
        self._first = max(share.lowest - 1, 0)  # the first cut that matters
        self._names = list(cuts)[self._first : share.highest + 1]

    def run(self, inputs: Any, on_inlet: OnInlet, on_outlet: OnOutlet) -> None:
        """Runs the stages from the inlet on.

        Args:
            inputs: the backbone's batch; without numbers (on the meta device) where the rank does not need them.
            on_inlet: returns the lowest stage's inlet; for the lowest rank, the batch itself.
            on_outlet: what to do at the end of each stage.
        """
        ran: list[int] = []
        below = _Below(self._device)
        inside = self._share.lowest > 0
        training = torch.is_grad_enabled()

        def at_cut(index: int, output: Any) -> Any:
            stage = self._first + index
            ran.append(stage)
            if stage < self._share.lowest:
                below.__exit__(None, None, None)
                below.done = True
                torch.set_grad_enabled(training)
                return on_inlet()
            handed_on = on_outlet(stage, output)
            if stage == self._share.highest:
                if not self._to_the_end:
                    raise _LeftError
                torch.set_grad_enabled(False)
            return handed_on

        hooks = hooked(submodules(self._backbone, self._names), at_cut)
        with torch.set_grad_enabled(training and not inside), hooks, hooks:
            if inside:
                below.__enter__()
            try:
                called(self._backbone, inputs if inside else on_inlet())
            except _LeftError:
                return
            finally:
                if inside and not below.done:
                    below.__exit__(None, None, None)
        check_order(self._names, [stage - self._first for stage in ran], self._backbone)


_META = torch.device("meta")


class _LeftError(BaseException):
    """The stages that matter have run."""


class _Below(TorchDispatchMode):
    """Numbers for what depends on none of the weights below, whatever device it asks for; the meta device for the rest."""

    done = False

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        without = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given))

        def moved(leaf: Any) -> Any:
            if without:
                return (
                    leaf.to("meta") if isinstance(leaf, Tensor) else _META if isinstance(leaf, torch.device) else leaf
                )
            return self._device if isinstance(leaf, torch.device) and leaf == _META else leaf

        args, kwargs = tree_map(moved, given)
        return func(*args, **kwargs)
