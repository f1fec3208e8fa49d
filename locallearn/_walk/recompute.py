"""Parts of a stage that run a second time in its backward, so that only their inputs are kept in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from locallearn._walk.hooks import has_hooks
from locallearn._walk.intercept import Interception, intercepted, original
from locallearn._walk.named import submodule
from locallearn._walk.replay import Learnt, Replay
from locallearn._walk.sameness import has_values
from locallearn._walk.segment import version
from locallearn._walk.undo import Reverted

Run: TypeAlias = tuple[str, ...]  # names of submodules, each of which takes the previous one's output and nothing else


def recomputed(backbone: nn.Module, runs: Mapping[Run, Learnt], concerned: Callable[[], bool]) -> Reverted[None]:
    """While open, a forward of ``backbone`` checkpoints each run of submodules as one function.

    This is just ``checkpoint(module, input, use_reentrant=False)`` for a run of one. What the backbone checkpoints itself
    stays as it is: inside of that nothing more is recomputed, whether it runs the first time or again.

    Args:
        backbone: whose forward is concerned.
        runs: what is recomputed together, with what is known of it. Runs lie inside of each other, or apart.
        concerned: tells, when a submodule is called, whether the call is a part of the pass.
    """
    again: set[int] = set()  # threads in which something runs a second time
    joined = [_Joined(run, [submodule(backbone, name) for name in run], again, runs[run], concerned) for run in runs]
    return intercepted([interception for one in joined for interception in one.interceptions])


def possible(backbone: nn.Module, runs: Mapping[Run, Learnt]) -> dict[Run, Learnt]:
    """``runs`` without what somebody else's hooks forbid now.

    Those of several submodules of which one has hooks, which would not see what they should; and those inside of a module
    that is checkpointed by hooks (``torch.distributed._composable.checkpoint``).
    """
    taken = [name for name, module in backbone.named_modules() if _checkpointed_by_hooks(module)] if runs else []
    return {
        run: learnt
        for run, learnt in runs.items()
        if not any(f"{run[0]}.".startswith(f"{name}.") for name in taken)
        and (len(run) == 1 or not has_hooks(*_ends(backbone, run)))
    }


def _checkpointed_by_hooks(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(getattr(hook, "__module__", "").startswith("torch.distributed._composable.checkpoint") for hook in hooks)


def _ends(backbone: nn.Module, run: Run) -> Iterator[nn.Module]:
    """The submodules that begin or end within a run: its own, and those that contain some of them."""
    for name in run:
        yield submodule(backbone, name)
        while name := name.rpartition(".")[0]:
            if not all(other.startswith(f"{name}.") for other in run):
                yield submodule(backbone, name)


class _Joined:
    """Submodules that run one after the other: the first runs them all, and the others hand on what they are given."""

    def __init__(
        self, run: Run, modules: Sequence[nn.Module], again: set[int], learnt: Learnt, concerned: Callable[[], bool]
    ) -> None:
        def takes_part() -> bool:
            return concerned() or get_ident() in again

        self.interceptions = [
            Interception(module, False, takes_part, partial(self._call, at)) for at, module in enumerate(modules)
        ]
        self._forwards = [original(interception) for interception in self.interceptions]
        self._run, self._modules, self._again, self._learnt = run, modules, again, learnt
        self._whole: Any = None

    def _call(self, at: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if at:
            return self._later(at, forward, *args, **kwargs)
        if torch.is_grad_enabled() and not in_checkpoint() and self._has_graph((args, kwargs)):
            return self._first(*args, **kwargs)
        return forward(*args, **kwargs)

    def _has_graph(self, given: object) -> bool:
        if any(leaf.requires_grad for leaf in tree_leaves(given) if isinstance(leaf, Tensor)):
            return True
        return any(weight.requires_grad for module in self._modules for weight in module.parameters())

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        given, shape = tree_flatten((args, kwargs))
        order: dict[Tensor, int] = {}  # a tensor that is given twice stays one: q is k is v
        places = [order.setdefault(leaf, len(order)) if isinstance(leaf, Tensor) else None for leaf in given]
        tensors = list(order)
        versions = [version(tensor) for tensor in tensors]
        compares = not self._learnt.same and all(map(has_values, tensors))
        replay = Replay(self._run[0], self._modules, self._forwards, self._again, self._learnt, compares=compares)
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in given]
        original = [(args, kwargs)]  # for the first run, which may put something into a list that it is given

        def run(*tensors: Tensor) -> Any:
            if original:
                args, kwargs = original.pop()
                return replay(*args, **kwargs)
            leaves = [leaf if at is None else tensors[at] for leaf, at in zip(constants, places, strict=True)]
            args, kwargs = tree_unflatten(leaves, shape)
            return replay(*args, **kwargs)

        with set_checkpoint_early_stop(False) if compares else nullcontext():
            result = checkpoint(run, *tensors, use_reentrant=False)
        if versions != [version(tensor) for tensor in tensors]:
            raise RuntimeError(
                f"{self._run[0]!r} changes its input in place, and cannot be recomputed from it. Build it with inplace=False, "
                "or leave it out of checkpoint="
            )
        self._whole = result if len(self._run) > 1 else None
        return result

    def _later(self, at: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._whole is None:
            return forward(*args, **kwargs)
        if len(args) != 1 or kwargs or args[0] is not self._whole or in_checkpoint():
            raise RuntimeError(
                f"{self._run[at]!r} does not take the output of {self._run[at - 1]!r} as it is, though it did when the backbone "
                "was wrapped (or a function that the backbone checkpoints itself begins between the two), so that they cannot "
                "be recomputed together. Name what is to be recomputed: checkpoint=<a class of modules>"
            )
        if at == len(self._run) - 1:
            self._whole = None
        return args[0]


def in_checkpoint(until: CodeType | None = None) -> bool:
    """Whether the caller runs inside of ``torch.utils.checkpoint``, and not by our own call of it.

    Callers are looked at up to one that runs ``until``, if there is one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        if frame.f_code is Replay._run.__code__:
            return False
        frame = frame.f_back
    return False
