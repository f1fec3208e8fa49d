"""What a loss is called with, and how views become one batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from locallearn._fitting.batches import concatenated
from locallearn._fitting.objective import registered, unit_loss


def test_the_loss_gets_the_decoders_output_for_each_view_and_the_targets_last() -> None:
    given: list[Tensor] = []

    def loss(*arguments: Tensor) -> Tensor:
        given.extend(arguments)
        return arguments[0].sum()

    features, labels = torch.arange(12.0).view(6, 2), torch.arange(2)
    unit_loss(0, nn.Identity(), loss, 3, labels, features)
    assert [tuple(part[:, 0].tolist()) for part in given[:3]] == [(0, 2), (4, 6), (8, 10)]
    assert given[3] is labels


def test_one_views_output_may_be_anything() -> None:
    class Twins(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x, "b": 2 * x}

    features = torch.ones(2, requires_grad=True)
    assert unit_loss(0, Twins(), lambda out: (out["a"] + out["b"]).sum(), 1, None, features).item() == 6
    with pytest.raises(ValueError, match="the 2 views along its first axis; got a dict"):
        unit_loss(0, Twins(), lambda a, b: a, 2, None, features)


def test_a_loss_of_one_element_is_a_scalar() -> None:
    assert unit_loss(0, nn.Identity(), lambda z: z.sum(0, keepdim=True), 1, None, torch.ones(3)).shape == ()


X = torch.arange(48.0).view(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("views", "shared"),
    [
        (X.unbind(), True),
        (X[0].chunk(2), True),
        (X.flatten(0, 1).split([2, 2]), True),
        ((X[0],), True),
        ((X[1], X[0]), False),
        ((X[0], X[0]), False),
        ((X[0], X[1].clone()), False),
        ((X[:, 0], X[:, 1]), False),
        ((X[0, :, :, 1:], X[1, :, :, 1:]), False),
        ((X.flatten(0, 1)[0:4:4], X.flatten(0, 1)[1:2]), True),
        (torch.rand(2, 4, 3, 8, 8).to(memory_format=torch.channels_last_3d).unbind(), False),
    ],
)
def test_views_become_one_batch_without_a_copy_where_they_are_neighbours(views: Sequence[Tensor], shared: bool) -> None:
    batch = concatenated(views)
    assert torch.equal(batch, torch.cat(tuple(views)))
    assert (batch.data_ptr() == views[0].data_ptr()) == shared


def test_a_list_of_losses_is_registered_functions_and_modules_alike() -> None:
    losses = registered([nn.MSELoss(), torch.nn.functional.mse_loss], 2)
    assert isinstance(losses, nn.ModuleList)
    a, b = torch.rand(2, 3)
    assert losses[0](a, b) == losses[1](a, b)
