"""Views: what a backbone takes, joined along the batch axis so that it sees all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from locallearn._walk.sameness import has_values
from locallearn._walk.segment import version
from locallearn._walk.trees import mapped, tensors

View: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
_KINDS = "a view is a tensor, a tuple (several arguments of the backbone) or a mapping (arguments by name)"


def plain_views(views: Sequence[Any]) -> list[Any]:
    """``views``, with mappings of any kind as dicts, which is what a call makes of them.

    Raises:
        TypeError: if one is neither a tensor nor a tuple or mapping with tensors in it.
        ValueError: if there are none.
    """
    if not views:
        raise ValueError("a local pass needs at least one view; got none")
    if wrong := [type(view).__name__ for view in views if not isinstance(view, Tensor | tuple | Mapping)]:
        raise TypeError(f"{_KINDS}, and each is an argument of its own: model.local_step(view1, view2); got {wrong}")
    plain = [dict(view) if isinstance(view, Mapping) else view for view in views]
    if not all(map(tensors, plain)):
        raise TypeError(f"{_KINDS}; got one without any tensor in it")
    return plain


def concatenated(views: Sequence[View], *, copy: bool = False) -> Any:
    """The views as one batch, without a graph, so that BatchNorm sees all of them.

    Tuples and mappings are joined tensor by tensor. What is no tensor is a constant, and so is a tensor without a batch axis: of
    no dimensions, or with a first axis of 1 where the batch's is longer. Constants have to agree.

    Args:
        views: of one form; tensors in the same place are of one shape, dtype and device.
        copy: whether the batch may be changed in place. If not, tensors that are neighbours in memory are not copied.

    Raises:
        TypeError: if one is not a view.
        ValueError: if there are none, or if they differ in more than the values of their tensors.
    """
    views = plain_views(views)
    first = views[0]
    if isinstance(first, dict):  # the order of names does not matter
        views = [{name: view[name] for name in first} if _names(view) == first.keys() else view for view in views]
    if len(only := [view for view in views if isinstance(view, Tensor)]) == len(views):
        return _joined(only, copy, "")
    flat = [tree_flatten_with_path(view) for view in views]
    specs = [spec for _, spec in flat]
    if any(spec != specs[0] for spec in specs):
        forms = "; ".join(str([keystr(path) for path, _ in leaves]) for leaves, _ in flat)
        raise ValueError(f"the views pass the backbone as one batch, so they need the same form; got {forms}")
    if len(views) == 1:
        return mapped(lambda tensor: _joined([tensor], copy, ""), views[0])
    rows = _first_axes([leaf for _, leaf in flat[0][0]])
    if len(rows) > 1:
        found = {keystr(path): tuple(leaf.shape) for path, leaf in flat[0][0] if isinstance(leaf, Tensor)}
        raise ValueError(
            f"several views are joined along the first axis of their tensors, which has to be the same; got {found}. Give a "
            "tensor that all views share a first axis of 1, or pass one view in which your inputs are joined already "
            "(of a graph: with its edges), with a loss that takes it apart"
        )
    joined = [
        _leaf([leaf for _, leaf in leaves], keystr(leaves[0][0]), rows, copy)
        for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(joined, specs[0])


def _names(view: Any) -> Any:
    return view.keys() if isinstance(view, dict) else None


def _first_axes(leaves: Sequence[Any]) -> set[int]:
    """How long the first axes of tensors are that have more than one row; with one row everywhere, that is it."""
    axes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    return axes - {1} or axes


def _leaf(leaves: Sequence[Any], where: str, rows: set[int], copy: bool) -> Any:
    first = leaves[0]
    if all(isinstance(leaf, Tensor) for leaf in leaves) and first.ndim and len(first) in rows:
        return _joined(leaves, copy, where)
    if not all(map(_agree, leaves, [first] * len(leaves))):
        got = ", ".join(f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        raise ValueError(
            f"the views differ in the constant {where}, which the backbone gets once for all of them; got {got}"
        )
    return first.detach() if isinstance(first, Tensor) else first


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return one is other or (same and not (has_values(one) and not torch.equal(one, other)))
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (RuntimeError, ValueError):  # arrays, which are not compared as a whole
        return False


def _joined(views: Sequence[Tensor], copy: bool, where: str) -> Tensor:
    if len({(view.shape, view.dtype, view.device) for view in views}) > 1:
        kinds = "; ".join(f"{tuple(view.shape)} {view.dtype} on {view.device}" for view in views)
        raise ValueError(
            f"the views pass the backbone as one batch, so they need the same shape, dtype and device; got {kinds}"
            f"{f' for {where}' if where else ''}. Views of several sizes (multi-crop) would pass one size after the other, "
            "and every stage's graph of the first would have to be kept until the last has run"
        )
    first = views[0].detach()
    if first.layout == torch.strided and not copy:
        storage = views[0].untyped_storage()
        if all(
            view.is_contiguous()
            and (not view.is_inference() or torch.is_inference_mode_enabled())  # no graph may save such a tensor
            and view.untyped_storage() is storage
            and view.storage_offset() == first.storage_offset() + k * first.numel()
            for k, view in enumerate(views)
        ):  # neighbours in memory, as from images.chunk(2), need no copy
            flat = first.as_strided((len(views) * first.numel(),), (1,))
            return flat.view(len(views) * len(first), *first.shape[1:]) if first.ndim else flat.view(())
    joined: Tensor = first.clone() if len(views) == 1 else torch.cat([view.detach() for view in views])
    return joined


@contextmanager
def spared(batch: Any, views: Sequence[View]) -> Iterator[None]:
    """Notices if ``batch`` is changed in place where it is the user's own ``views``.

    Raises:
        ViewsChangedError: at the end, if they were changed.
    """
    before = [(tensor, version(tensor)) for tensor in tensors(batch)]
    yield
    changed = [tensor for tensor, known in before if version(tensor) != known]
    if changed and not {*map(_memory, changed)}.isdisjoint(map(_memory, tensors(plain_views(views)[0]))):
        raise ViewsChangedError(
            "the backbone (or a loss) has changed the views of this step in place, which it did not when it was wrapped, in eval "
            "mode. Take what is not in place, such as Dropout(inplace=False). Or go on: from the next step on it gets a copy"
        )


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else tensor


class ViewsChangedError(RuntimeError):
    """The user's views were overwritten."""


def rows(batch: Any) -> int | None:
    """How long the batch axis is: the first axis of all tensors but those with one row; ``None`` where they differ."""
    if isinstance(batch, Tensor):
        return len(batch)
    axes = _first_axes(tensors(batch))
    return axes.pop() if len(axes) == 1 else None


def told(batch: Any) -> str:
    """The shapes and dtypes in ``batch``, for messages."""
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)} and {batch.dtype}"
    return f"the batch {mapped(lambda tensor: f'{tuple(tensor.shape)} {tensor.dtype}', batch)}"


def example_batch(backbone: nn.Module, example: View | Sequence[View] | None) -> Any:
    """``example``, views concatenated; by default two 224-pixel RGB images in the backbone's dtype and device.

    A list is one of views; a tuple or a mapping is one view.
    """
    if example is not None and not isinstance(example, Tensor):
        if not isinstance(example, tuple | Mapping | Sequence):
            raise TypeError(
                f"example is a view, a tensor, tuple or mapping of tensors, or a list of views; got {example!r}"
            )
        example = concatenated([example] if isinstance(example, tuple | Mapping) else list(example), copy=True)
    if example is not None:
        if rows(example) == 0:
            raise ValueError("example is a batch without anything in it; give two inputs at least")
        return example
    weight = next((t for t in backbone.parameters() if t.is_floating_point()), torch.empty(0))
    return torch.zeros(2, 3, 224, 224, dtype=weight.dtype, device=weight.device)
