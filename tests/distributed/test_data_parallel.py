"""Four gloo processes: however a model is spread over them, its gradients are the mean, or it is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from oracle import assert_same, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from locallearn import LocalWrapper, MLPDecoder, Plan, Soft
from locallearn.distributed import average_gradients, reducer

WORLD = 4
STEPS = 4
FSDP2_RUNS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)  # torch 2.6 has it for accelerators alone


class LocalNegatives(nn.Module):
    """Each process's own, so that the mean is easy to say."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(a @ b.T, torch.arange(len(a)))


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(before, 8), nn.Linear(8, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Sometimes(Block):
    """The last process uses one weight more, in odd steps."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.more, self.runs = nn.Linear(after, after), False

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.more(x) if self.runs else x


class Words(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x * 10).long().clamp(0, 49)).mean(1)


def blocks() -> nn.Sequential:
    return nn.Sequential(Block(6, 5), Block(5, 5), Block(5, 6), Block(6, 4))


def wrapped(net: nn.Module | None = None, **options: Any) -> LocalWrapper:
    net = blocks() if net is None else net
    options = {"decoder": MLPDecoder, "example": torch.rand(2, 6), "loss": LocalNegatives()} | options
    return LocalWrapper(net, [str(k) for k in range(len(list(net.children())))], **options)


def shared_decoder() -> LocalWrapper:
    one = MLPDecoder(5)
    net = nn.Sequential(Block(6, 5), Block(5, 5), Block(5, 5))
    return wrapped(net, decoder=[one, one], loss=nn.ModuleList([LocalNegatives(), LocalNegatives()]))


MODELS: dict[str, Callable[[], LocalWrapper]] = {
    "overlap 0": lambda: wrapped(overlap=0),
    "overlap 1": lambda: wrapped(overlap=1),
    "end to end": lambda: wrapped(overlap=3),
    "first blocks": lambda: wrapped(nn.Sequential(*(Block(6, 6) for _ in range(5))), plan=Plan.first_blocks(3)),
    "one decoder for all": shared_decoder,
    "soft": lambda: wrapped(sharing=Soft(0.1)),
    "not in every process": lambda: wrapped(nn.Sequential(Block(6, 5), Sometimes(5, 5), Block(5, 5))),
    "sparse": lambda: wrapped(nn.Sequential(Words(), Block(6, 5), Block(5, 5)), example=torch.rand(2, 7)),
}


def build(name: str) -> LocalWrapper:
    torch.manual_seed(0)
    return MODELS[name]()


def views(name: str, rank: int, step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.rand(2, 3, 7 if name == "sparse" else 6, generator=generator).unbind()


def prepare(model: LocalWrapper, rank: int, step: int) -> None:
    """What changes from step to step: a branch is taken, a stage is frozen and thawed; gradients add up in step 2."""
    for part in model.backbone.modules():
        if isinstance(part, Sometimes):
            part.runs = rank == WORLD - 1 and step % 2 == 1
    model.backbone[0].requires_grad_(step != 3)
    if step != 2:
        model.zero_grad()


def by_hand(name: str, rank: int, step: int) -> dict[str, Tensor]:
    """One process's gradients of one step."""
    model = build(name)
    prepare(model, rank, step)
    model.local_step(*views(name, rank, step))
    return {key: gradient.to_dense() for key, gradient in gradients(model).items()}


def means(name: str, step: int) -> dict[str, Tensor]:
    each = [by_hand(name, rank, step) for rank in range(WORLD)]
    keys = list(dict.fromkeys(key for one in each for key in one))
    return {key: sum(one.get(key, torch.tensor(0.0)) for one in each) / WORLD for key in keys}  # type: ignore[misc]


def expected(name: str) -> list[dict[str, Tensor]]:
    one = [means(name, step) for step in range(STEPS)]
    one[2] = {key: one[1].get(key, torch.tensor(0.0)) + one[2].get(key, torch.tensor(0.0)) for key in one[1] | one[2]}
    return one


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def reduced_steps(rank: int, name: str) -> None:
    """``local_step(group=)`` in four steps, with an optimiser's zero_grad between them, and a copy made half-way."""
    model, wanted = build(name), expected(name)
    for step in range(STEPS):
        prepare(model, rank, step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.local_step(*views(name, rank, step), group=dist.group.WORLD)
        ours = {key: gradient.to_dense() for key, gradient in gradients(model).items()}
        assert_same(ours, wanted[step], 1e-12)
        assert ours.keys() == wanted[step].keys(), "what nobody has stays None"
        if step == 2:
            model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    if name == "sparse":
        assert model.backbone[0].table.weight.grad is None  # frozen in the last step
        prepare(model, rank, 0)
        model.local_step(*views(name, rank, 0), group=dist.group.WORLD)
        assert model.backbone[0].table.weight.grad.is_sparse


def messages_leave_early(rank: int) -> list[tuple[int, int]]:
    """For every unit, in the second step: how many messages had left when its loss was evaluated, and of how many."""
    reducer._LEAST = 1
    sent: list[int] = []

    class Noting(LocalNegatives):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            sent.append(Flights.count)
            return super().forward(a, b)

    class Flights(reducer.Flight):
        count = 0

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            Flights.count += 1

    reducer.Flight = Flights  # type: ignore[misc]
    torch.manual_seed(0)
    model = wrapped(loss=Noting())
    model.local_step(*views("", rank, 0), group=dist.group.WORLD)
    assert sent == [0, 0, 0]
    model.local_step(*views("", rank, 0), group=dist.group.WORLD)
    return [(early, Flights.count) for early in sent[3:]]


def refused_steps(rank: int) -> list[str]:
    torch.manual_seed(rank)
    other = wrapped()
    differ = error(lambda: other.local_step(*views("", rank, 0), group=dist.group.WORLD))
    torch.manual_seed(0)
    more = wrapped(blocks() if rank else nn.Sequential(Block(6, 5), Block(5, 4)))
    shapes = error(lambda: more.local_step(*views("", rank, 0), group=dist.group.WORLD))
    hooked = build("overlap 1")
    hooked.backbone[0].up.weight.register_post_accumulate_grad_hook(lambda weight: None)
    hooks = error(lambda: hooked.local_step(*views("", rank, 0), group=dist.group.WORLD))
    return [differ, shapes, hooks]


class Borrowing(nn.Module):
    """A decoder that begins to use another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp, self.other, self.borrows = nn.Linear(width, 5), nn.Linear(5, 5), False

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.mlp(x)) if self.borrows else self.mlp(x)


def another_gradient_later(rank: int) -> str:
    """A second one in the same step, for weights that had one alone in the first step."""
    reducer._LEAST = 1
    torch.manual_seed(0)
    model = wrapped(decoder=Borrowing)
    model.decoders[2].other = model.decoders[0].mlp
    model.decoders[2].mlp = nn.Linear(4, 5)
    model.local_step(*views("", rank, 0), group=dist.group.WORLD)
    model.decoders[2].borrows = True
    return error(lambda: model.local_step(*views("", rank, 0), group=dist.group.WORLD))


def sharded(rank: int) -> dict[str, str]:
    """FSDP2 in every place, and FSDP1."""
    found: dict[str, str] = {}
    given = views("", rank, 0)

    def entries(where: str, model: LocalWrapper) -> None:
        found[f"{where}, local_step"] = error(lambda: model.local_step(*given))
        found[f"{where}, call"] = error(lambda: model(*given).backward())

    whole = build("overlap 1")
    fully_shard(whole)
    found["whole, local_step"] = error(lambda: whole.local_step(*given))
    if FSDP2_RUNS:
        register_fsdp_forward_method(whole, "local_step")
        found["whole, local_step registered"] = error(lambda: whole.local_step(*given))
        wanted = means("overlap 1", 0)
        whole = build("overlap 1")
        fully_shard(whole)
        whole(*given).backward()
        average_gradients(whole.parameters())  # there is nothing left to average
        assert_same({n: w.grad.full_tensor() for n, w in whole.named_parameters() if w.grad is not None}, wanted, 1e-12)

    inside = build("overlap 1")
    fully_shard(inside.backbone)
    entries("backbone", inside)
    parts = build("overlap 1")
    for part in [*parts.backbone, *parts.decoders]:
        fully_shard(part)
    entries("parts", parts)
    fully_shard(parts)
    if FSDP2_RUNS:
        entries("parts and whole", parts)
    before = blocks()
    fully_shard(before)
    found["before wrapping"] = error(lambda: wrapped(before))

    cpu = torch.device("cpu")
    for original in (False, True):
        old = FullyShardedDataParallel(build("overlap 1"), device_id=cpu, use_orig_params=original)
        found[f"old {original}, call"] = error(lambda old=old: old(*given))
        found[f"old {original}, local_step"] = error(lambda old=old: old.module.local_step(*given))
    replicated = DistributedDataParallel(blocks())
    found["ddp inside"] = error(lambda: wrapped(replicated))
    later = build("overlap 1")
    later.backbone = DistributedDataParallel(later.backbone)
    entries("ddp later", later)
    return found


def tensor_parallel(rank: int) -> str:
    """Inside of stages, over all processes, and over two while the two pairs have other data."""
    column_row = {
        f"{k}.{name}": style
        for k in range(4)
        for name, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
    }
    model = build("overlap 1")
    parallelize_module(model.backbone, init_device_mesh("cpu", (WORLD,)), column_row)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.local_step(*views("", 0, 0))  # the same data everywhere, and no warning
    average_gradients(model.parameters())  # there is nothing to average
    assert_same(full(model), by_hand("overlap 1", 0, 0), 1e-9)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh.get_local_rank("dp")
    wanted = [by_hand("overlap 1", k, 0) for k in range(2)]
    wanted = {key: (wanted[0][key] + wanted[1][key]) / 2 for key in wanted[0]}  # type: ignore[assignment]
    for reduced in (True, False):
        model = build("overlap 1")
        parallelize_module(model.backbone, mesh["tp"], column_row)
        if reduced:
            for _ in range(2):
                model.zero_grad()
                model.local_step(*views("", replica, 0), group=mesh.get_group("dp"))
        else:
            model.local_step(*views("", replica, 0))
            mixed = error(lambda model=model: average_gradients(model.parameters()))
            average_gradients(model.parameters(), mesh.get_group("dp"))
        assert_same(full(model), wanted, 1e-9)
    return mixed


def full(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def compiled(rank: int) -> None:
    """``torch.compile`` finds nothing to compile in the pass, and DistributedDataParallel around it works."""
    (alone,) = [group for other in range(WORLD) if (group := dist.new_group([other])) and other == rank]
    if rank:
        return
    model = build("overlap 1")
    ddp = DistributedDataParallel(model, process_group=alone)
    wanted = by_hand("overlap 1", 0, 0)
    for step in (
        torch.compile(model, backend="eager"),
        torch.compile(ddp, backend="eager"),
        DistributedDataParallel(torch.compile(model, backend="eager"), process_group=alone),
    ):
        for _ in range(2):
            model.zero_grad()
            step(*views("", 0, 0)).backward()
            assert_same(gradients(model), wanted, 1e-12)


def work(rank: int) -> dict[str, Any]:
    for name in MODELS:
        reduced_steps(rank, name)
    found: dict[str, Any] = {"refused": refused_steps(rank), "later": another_gradient_later(rank)}
    found["early"] = messages_leave_early(rank)
    found["mixed"] = tensor_parallel(rank)
    found["sharded"] = sharded(rank)
    compiled(rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks saw; they compare gradients themselves."""
    return processes.run(work, WORLD, tmp_path_factory.mktemp("ranks"))


def test_messages_leave_before_the_last_unit_is_evaluated(found: list[dict[str, Any]]) -> None:
    for rank in found:
        early = [sent for sent, _ in rank["early"]]
        assert early == sorted(early)
        assert 0 < early[1] < early[2] < rank["early"][-1][1]


def test_processes_that_begin_or_go_on_differently_are_told_apart(found: list[dict[str, Any]]) -> None:
    for rank in found:
        values, shapes, hooks = rank["refused"]
        assert "of 28 tensors, 28 differ between ranks 0 and" in values
        assert "torch.distributed.broadcast(t, 0)" in values
        assert "rank 0 of the group has 12 tensors, rank 1 28" in shapes
        assert "register_post_accumulate_grad_hook" in hooks
        assert "got another gradient after theirs had been sent" in rank["later"]


def test_what_is_sharded_in_parts_is_refused_with_the_cure(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["sharded"]
        assert all(told.values()), [case for case, error in told.items() if not error]
        for case, error in told.items():
            if case.startswith("ddp"):
                assert "DistributedDataParallel(LocalWrapper(...))" in error, case
            elif case.endswith(("local_step", "registered")) and not case.startswith("old"):
                assert error.startswith("RuntimeError: local_step goes past fully_shard"), case
            else:
                assert "fully_shard(model), then loss = model(*views); loss.backward()" in error, case
        assert "'backbone.0', 'backbone.1', 'backbone.2' and 4 more" in told["parts, call"]


def test_a_mean_that_would_mix_parts_of_a_dtensor_names_the_group_to_give(found: list[dict[str, Any]]) -> None:
    assert all("ranks [0, 1]" in rank["mixed"] or "ranks [2, 3]" in rank["mixed"] for rank in found)
    assert all("group=mesh['dp'].get_group()" in rank["mixed"] for rank in found)
