"""InfoNCE refuses what cannot be right, and says what was given and what is expected."""

import pytest
import torch
from torch import Tensor

from locallearn import InfoNCE, info_nce

Z = torch.randn(6, 4)
LABELS = torch.arange(6)


@pytest.mark.parametrize(
    ("views", "options", "error", "message"),
    [
        ((), {}, TypeError, "at least one view"),
        ((Z, [1.0]), {}, TypeError, "view 1 must be a tensor of embeddings; got list"),
        (
            (Z, Z.long()),
            {},
            TypeError,
            r"view 1 must hold floating-point embeddings; got torch.int64 of shape \(6, 4\)",
        ),
        ((Z, Z.cfloat()), {}, TypeError, "floating-point embeddings; got torch.complex64"),
        ((Z, Z[:5]), {}, ValueError, r"one shape \(N, D\); got \(6, 4\), \(5, 4\)"),
        ((Z, Z[:, :3]), {}, ValueError, r"got \(6, 4\), \(6, 3\)"),
        ((Z[0], Z[0]), {}, ValueError, r"got \(4,\), \(4,\)"),
        ((Z, Z, torch.randn(9, 4)), {}, ValueError, "negatives="),
        ((Z, Z.to("meta")), {}, ValueError, "one device; got cpu, meta"),
        (
            (Z, Z),
            {"labels": LABELS.to("meta")},
            ValueError,
            "views and labels must all be on one device; got cpu, cpu, meta",
        ),
        ((Z, Z), {"negatives": Z.to("meta")}, ValueError, "views and negatives must all be on one device"),
        ((Z,), {}, ValueError, "one view without labels"),
        ((Z[:1], Z[:1]), {}, ValueError, "InfoNCE needs at least two pairs, or negatives=.*got N = 1"),
        ((Z[:1], Z[:1]), {"form": "one-way"}, ValueError, "at least two pairs"),
        ((Z[:0], Z[:0]), {}, ValueError, "got N = 0"),
        ((Z[:0], Z[:0]), {"negatives": Z}, ValueError, "got N = 0"),
        ((Z, Z, Z), {"form": "two-way"}, ValueError, "form='two-way' compares two views; got 3"),
        ((Z, Z), {"form": "clip"}, ValueError, "form must be one of 'nt-xent', 'two-way', 'one-way'; got 'clip'"),
        ((Z, Z), {"reduction": "avg"}, ValueError, "reduction must be one of .*; got 'avg'"),
        ((Z, Z), {"same_label": "repel"}, ValueError, "same_label must be one of"),
        ((Z, Z), {"gather": "always"}, ValueError, "gather must be one of"),
        ((Z, Z), {"gather": True}, ValueError, "init_process_group"),
        ((Z, Z), {"precision": "half"}, ValueError, "precision must be one of 'single', 'input'; got 'half'"),
        ((Z, Z), {"precision": "input", "tile": 0}, ValueError, "precision='input' needs tiles"),
        ((Z, Z), {"group": object()}, ValueError, "init_process_group.*leave it out"),
        ((Z, Z), {"temperature": 0}, ValueError, "temperature must be positive and finite; got 0"),
        ((Z, Z), {"temperature": -0.1}, ValueError, "got -0.1"),
        ((Z, Z), {"temperature": float("nan")}, ValueError, "got nan"),
        ((Z, Z), {"temperature": "0.1"}, TypeError, "temperature must be a number or a tensor of one element; got str"),
        ((Z, Z), {"temperature": torch.ones(2)}, ValueError, r"got shape \(2,\) of torch.float32"),
        ((Z, Z), {"temperature": torch.tensor(1)}, ValueError, "torch.int64"),
        ((Z, Z), {"tile": -1}, ValueError, "tile must be .* got -1"),
        ((Z, Z), {"tile": 2.5}, ValueError, "tile must be"),
        ((Z, Z), {"labels": LABELS[:5]}, ValueError, r"labels must have shape \(6,\), one per row; got \(5,\)"),
        ((Z, Z), {"labels": LABELS.float()}, TypeError, "labels must be integers; got torch.float32"),
        ((Z, Z), {"labels": [0, 1]}, TypeError, "labels must be a tensor; got list"),
        ((Z,), {"labels": LABELS, "same_label": "ignore"}, ValueError, "needs two views"),
        (
            (Z, Z),
            {"negatives": Z[:, :3]},
            ValueError,
            r"a queue \(M, 4\) or one set per query \(6, M, 4\).*got \(6, 3\)",
        ),
        ((Z, Z), {"negatives": torch.randn(5, 2, 4)}, ValueError, r"got \(5, 2, 4\)"),
        ((Z, Z), {"negatives": torch.randn(0, 4)}, ValueError, "M > 0"),
        ((Z, Z), {"negatives": Z.long()}, TypeError, "negatives must hold floating-point"),
        ((Z, Z), {"negatives": Z, "form": "two-way"}, ValueError, "without form='two-way'"),
        ((Z, Z), {"negatives": Z, "labels": LABELS}, ValueError, "labels given"),
        ((Z,), {"negatives": Z, "labels": LABELS}, ValueError, "got 1 view"),
    ],
)
def test_bad_input_is_named(views: tuple[Tensor, ...], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce(*views, **options)
    settings = {name: value for name, value in options.items() if name not in ("labels", "negatives")}
    inputs = {name: value for name, value in options.items() if name in ("labels", "negatives")}
    with pytest.raises(error, match=message):
        InfoNCE(**settings)(*views, **inputs)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"form": "clip"}, {"reduction": "avg"}, {"tile": -1}])
def test_settings_are_refused_when_the_module_is_made(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        InfoNCE(**settings)


def test_targets_twice_are_refused() -> None:
    with pytest.raises(TypeError, match="view 2 must hold floating-point embeddings"):
        InfoNCE()(Z, Z, LABELS, labels=LABELS)


def test_a_pair_with_negatives_of_its_own_is_enough() -> None:
    assert info_nce(Z[:1], Z[:1], negatives=Z).isfinite()
