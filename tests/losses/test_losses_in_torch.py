"""InfoNCE behaves as torch's own functions do: compiled, faked, copied, threaded, refused where it cannot be right."""

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from infonce_oracle import pairs
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from locallearn import InfoNCE, info_nce
from locallearn.losses._positives import _positives
from locallearn.losses._tiles import _negatives

functions_compiled = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of torch 2.6's dynamo itself
FORMS = ["nt-xent", "two-way", "one-way"]
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def gradients(loss: Tensor, views: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, views)


@functions_compiled
@pytest.mark.parametrize(
    "options",
    [
        *({"form": form, "tile": tile} for form in FORMS for tile in (None, 4)),
        {"labels": LABELS},
        {"temperature": 0.01},
        {"tile": 0},
        {"precision": "input", "return_top1": True},
    ],
    ids=str,
)
def test_compiles_into_one_graph(options: dict) -> None:
    torch._dynamo.reset()
    views = pairs(6, 4, dtype=torch.bfloat16 if "precision" in options else torch.float32)
    compiled = torch.compile(lambda z0, z1: info_nce(z0, z1, **options), fullgraph=True, backend="aot_eager")
    found, expected = compiled(*views), info_nce(*views, **options)
    torch.testing.assert_close(found, expected)
    if options.get("return_top1"):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(gradients(found, views), gradients(expected, views))


@functions_compiled
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of torch 2.6 itself
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    views = pairs(6, 4, dtype=torch.float32)
    module = InfoNCE(nn.Parameter(torch.tensor(0.2)), return_top1=True)
    loss, top1 = torch.compile(module, fullgraph=True)(*views)
    expected, expected_top1 = module(*views)
    torch.testing.assert_close((loss, top1), (expected, expected_top1))
    inputs = [*views, module.temperature]
    torch.testing.assert_close(gradients(loss, inputs), gradients(expected, inputs), rtol=1e-5, atol=1e-6)


opchecked = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own


@opchecked
@pytest.mark.parametrize(("top1", "products"), [(True, None), (False, None), (False, torch.bfloat16)])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("labels", [[], [LABELS, LABELS]], ids=["", "labels"])
def test_opcheck_of_negatives(bounded: bool, labels: list[Tensor], top1: bool, products: torch.dtype | None) -> None:
    torch.library.opcheck(_negatives, (pairs(6, 4), labels, [0, 0, 0, 1, 1, 0, 1, 1], 2, bounded, 4, top1, products))


@opchecked
def test_opcheck_of_positives() -> None:
    torch.library.opcheck(_positives, (pairs(6, 4), [LABELS, LABELS], [0, 0, 0, 1, 1, 0, 1, 1], 4, None))


@pytest.mark.parametrize(
    "options", [*({"form": form, "tile": tile} for form in FORMS for tile in (None, 4)), {"labels": LABELS}], ids=str
)
def test_second_derivative_is_refused_in_tiles_and_right_in_the_matrix(options: dict) -> None:
    views = pairs(6, 4)
    first = torch.autograd.grad(info_nce(*views, **options), views, create_graph=True)
    with pytest.raises(NotImplementedError, match="tile=0"):
        first[0].square().sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda z0, z1: info_nce(z0, z1, **{**options, "tile": 0}, temperature=0.5), views
    )


@pytest.mark.parametrize(
    "options", [*({"form": form, "tile": tile} for form in FORMS for tile in (None, 4)), {"labels": LABELS}], ids=str
)
def test_fake_and_meta_tensors_give_shapes(options: dict) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        views = [torch.empty(6, 4, requires_grad=True) for _ in range(2)]
        loss = info_nce(*views, **options)
        loss.backward()
        assert loss.shape == ()
        assert views[1].grad.shape == (6, 4)
    views = [torch.empty(6, 4, device="meta", requires_grad=True) for _ in range(2)]
    options = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in options.items()}
    rows = info_nce(*views, **options, reduction="none")
    rows.sum().backward()
    assert rows.device.type == "meta"
    assert views[0].grad.shape == (6, 4)


@pytest.mark.parametrize("tile", [None, 4])
def test_autocast_changes_nothing(tile: int | None) -> None:
    views = pairs(6, 4, dtype=torch.float32)
    expected = info_nce(*views, tile=tile)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(*views, tile=tile), expected)
        found = gradients(info_nce(*views, tile=tile), views)
    assert all(map(torch.equal, found, gradients(expected, views)))


def test_backward_into_chosen_inputs() -> None:
    weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
    views = pairs(6, 4)
    info_nce(views[0] @ weight, views[1] @ weight).backward(inputs=[weight])
    assert weight.grad is not None
    assert views[0].grad is None


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("form", FORMS)
def test_backward_twice_over_a_retained_graph(form: str, tile: int | None) -> None:
    views = pairs(6, 4)
    loss = info_nce(*views, form=form, tile=tile)
    first = torch.autograd.grad(loss, views, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, views)))


def test_a_hook_may_call_it() -> None:
    views, losses = pairs(6, 4), []
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, args, out: losses.append(info_nce(*out.chunk(2))))
    layer(torch.cat(views))
    assert torch.equal(losses[0], info_nce(*views))


def test_threads_do_not_disturb_each_other() -> None:
    many = [pairs(40, 8, seed=seed) for seed in range(8)]
    alone = [gradients(info_nce(*views, tile=8), views) for views in many]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda views: gradients(info_nce(*views, tile=8), views), many))
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("temperature", [0.2, nn.Parameter(torch.tensor(0.2))], ids=["number", "learnable"])
def test_copies_and_pickles(temperature: float | nn.Parameter) -> None:
    module, views = InfoNCE(temperature, form="two-way"), pairs(6, 4)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(*views), module(*views))


def test_inputs_are_left_alone() -> None:
    views = pairs(6, 4)
    before = [view.detach().clone() for view in views]
    info_nce(*views).backward()
    assert all(map(torch.equal, views, before))


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_any_layout_will_do(layout: str) -> None:
    z = (
        torch.randn(4, 6, dtype=torch.float64).T
        if layout == "strided"
        else torch.randn(4, dtype=torch.float64).expand(6, 4)
    )
    torch.testing.assert_close(info_nce(z, z + 1), info_nce(z.clone(memory_format=torch.contiguous_format), z + 1))


@pytest.mark.parametrize("options", [{}, {"form": "two-way"}, {"form": "one-way"}, {"labels": torch.arange(3072) // 2}])
def test_the_matrix_is_never_whole(options: dict) -> None:
    n, d = 3072, 16
    views = pairs(n, d, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        info_nce(*views, **options).backward()
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 4 * n * d < peak < 4 * n * n  # bytes: more than a view's gradient, less than one view's matrix


def test_importing_it_stays_light() -> None:
    code = "import sys, locallearn.losses; print([m for m in ('torchvision', 'torch._dynamo') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
