"""Where stages end in a given backbone: names found and checked, hooks on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from locallearn._walk.hooks import has_backward_hooks
from locallearn._walk.intercept import Interception, intercepted, is_compiled
from locallearn._walk.named import submodule
from locallearn._walk.trees import tensors
from locallearn._walk.undo import Reverted, attached


def find(backbone: nn.Module, stages: Sequence[str | int | nn.Module]) -> tuple[str, ...]:
    """The names of the submodules after which the stages end.

    Args:
        backbone: where to look.
        stages: names of submodules (dotted ones too), the submodules themselves, or child indices of an ``nn.Sequential``.

    Raises:
        TypeError: if ``stages`` is no sequence of those.
        ValueError: if one is unknown or named twice, all of them in one message.
    """
    kind = type(backbone).__name__
    if isinstance(stages, str | nn.Module) or not isinstance(stages, Sequence) or not stages:
        raise TypeError(
            f"stages is a list of the submodules after which a stage ends, such as stages=['layer1', 'layer2']; got {stages!r}"
        )
    modules = dict(backbone.named_modules(remove_duplicate=False))
    del modules[""]
    children = [name for name in modules if "." not in name]
    found: list[str] = []
    unknown: list[object] = []
    for stage in stages:
        name: str | None = None
        if isinstance(stage, str):
            name = stage if stage in modules else None
        elif isinstance(stage, nn.Module):
            name = next((name for name, module in modules.items() if module is stage), None)
        elif isinstance(stage, bool) or not isinstance(stage, int):
            raise TypeError(f"a stage is a name, a module or a child index; got {stage!r}")
        elif not isinstance(backbone, nn.Sequential):
            raise TypeError(f"child indices need an nn.Sequential; {kind} is none. Name its submodules: {children}")
        elif -len(children) <= stage < len(children):
            name = children[stage]
        if name is None:
            unknown.append(type(stage).__name__ if isinstance(stage, nn.Module) else stage)
        else:
            found.append(name)
    if unknown:
        raise ValueError(f"stages name submodules {unknown} that {kind} does not have; it has {children}")
    first: dict[nn.Module, str] = {}
    for name in found:
        if (other := first.setdefault(modules[name], name)) != name or found.count(name) > 1:
            same = f"{name!r} is named twice" if other == name else f"{other!r} and {name!r} are the same module"
            raise ValueError(f"a stage ends once; in stages, {same}")
    return tuple(found)


def submodules(backbone: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The submodules that ``cuts`` name, none of them inside of compiled or scripted code, where hooks do not run.

    Raises:
        ValueError: if the backbone, or a submodule that is a cut or holds one, went through ``torch.compile`` or ``torch.jit``.
    """
    _check_python(type(backbone).__name__, "it", backbone)
    found = []
    for cut in cuts:
        module, steps = backbone, cut.split(".")
        for at, step in enumerate(steps):
            module = submodule(module, step)
            _check_python(type(backbone).__name__, f"its submodule {'.'.join(steps[: at + 1])!r}", module)
        found.append(module)
    return found


def _check_python(kind: str, who: str, module: nn.Module) -> None:
    if "_orig_mod" in module._modules or is_compiled(module):
        raise ValueError(
            f"{kind} cannot be cut: {who} was compiled, and hooks inside of compiled code do not run. Give LocalWrapper the "
            "module as it was before torch.compile"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{kind} cannot be cut: {who} was scripted or traced, and takes no hooks. Give LocalWrapper the module as it was "
            "before torch.jit, and script it after training; or end the stages elsewhere, for instance after an nn.Identity() "
            "that follows it"
        )


def hooked(ends: Sequence[nn.Module], on_outlet: Callable[[int, Any], Any]) -> Reverted[Callable[[], bool]]:
    """While open, a forward goes on with ``on_outlet(stage, outlet)`` in place of the outlet of each of ``ends``.

    Only the thread that called it is concerned, and not what ``on_outlet`` itself runs: a decoder, a loss or another
    thread that calls the backbone meanwhile finds it plain. What is yielded tells whether a call is concerned.
    """
    owner, busy = get_ident(), False

    def concerned() -> bool:
        return not busy and get_ident() == owner

    def hand_on(stage: int, output: Any) -> Any:
        nonlocal busy
        busy = True
        try:
            return on_outlet(stage, output)
        finally:
            busy = False

    def hook(stage: int) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, output: hand_on(stage, output) if concerned() else None

    def call(stage: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return hand_on(stage, result)

    watched = [end for end in ends if has_backward_hooks(end)] if has_backward_hooks(*ends) else []
    hooks = attached({}, {end: hook(stage) for stage, end in enumerate(ends) if end not in watched})
    calls = intercepted(  # a stage ends behind the hooks on its backward
        [Interception(end, True, concerned, partial(call, stage)) for stage, end in enumerate(ends) if end in watched]
    )

    def on() -> Callable[[], bool]:
        hooks.__enter__()
        calls.__enter__()
        return concerned

    def off() -> None:
        hooks.__exit__()
        calls.__exit__()

    return Reverted(on, off)


def checked(stage: int, cut: str, output: Any) -> Any:
    """``output`` if there is a tensor in it.

    Raises:
        TypeError: otherwise.
    """
    if isinstance(output, Tensor) or tensors(output):
        return output
    raise TypeError(
        f"stage {stage} ends after {cut!r}, which returned a {type(output).__name__} without a tensor that is found in it. End "
        "the stage after a submodule that returns a tensor, or a tuple, list, dict or dataclass of tensors; another class is "
        "gone through if torch knows how: torch.utils._pytree.register_pytree_node"
    )


def check_order(cuts: Sequence[str], ran: Sequence[int], backbone: nn.Module) -> None:
    """Checks that each stage ended once, and in the order of ``cuts``; ``ran`` lists the stages as they ended.

    Raises:
        ValueError: otherwise.
    """
    never = [cut for stage, cut in enumerate(cuts) if stage not in ran]
    twice = sorted({cuts[stage] for stage in ran if ran.count(stage) > 1})
    if never:
        raise ValueError(f"stages end after submodules that never ran in a forward: {never}{_why(backbone, never)}")
    if twice:
        around = next(
            (outer for outer in map(_around, [backbone] * len(twice), twice) if outer), "the module around it"
        )
        raise ValueError(
            f"stages end after submodules that ran more than once in a forward: {twice}. End them after submodules that run "
            "once. Each run uses the same weights, so that all of them belong into one stage, which may end after "
            f"{around}; or give each run a module of its own"
        )
    if list(ran) != sorted(ran):
        raise ValueError(
            f"stages are listed in the order in which they run: stages={[cuts[stage] for stage in ran]}; got {list(cuts)}"
        )


def _around(backbone: nn.Module, name: str) -> str:
    """The submodule around ``name`` that is called itself."""
    while name := name.rpartition(".")[0]:
        if not isinstance(backbone.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            return repr(name)
    return ""


def _why(backbone: nn.Module, never: Sequence[str]) -> str:
    """What hides the calls of ``never``, and what to name instead."""
    if isinstance(backbone, torch.fx.GraphModule):
        return (
            ". A torch.fx graph, as create_feature_extractor makes it, calls what it was traced down to: blocks have come apart "
            "into their layers. Trace it with the blocks whole, create_feature_extractor(..., tracer_kwargs={'leaf_modules': "
            "[type(block)]}), and end stages after blocks; or give the model that it was made from"
        )
    inside = {cut: [*backbone.get_submodule(cut)._modules] for cut in never}
    if ends := [f"{cut}.{parts[-1]}" for cut, parts in inside.items() if parts]:
        return (
            ". What holds modules and is not called itself, as an nn.ModuleList, ends with the last of them that is; name "
            f"that, such as {ends[0]!r}"
        )
    return ""
