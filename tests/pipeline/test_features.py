"""Two gloo processes: what surrounds the steps of a pipeline (state, clipping, labels, precision), and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import cases
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, adamw, off, pipeline, sgd, single
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from zoo import conv, small

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan, Soft, TokenDecoder, Unit, fused, info_nce
from locallearn.pipeline import Pipeline, PipelineError
from locallearn.pipeline.lost import together

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def train(pipe: Pipeline, name: str, steps: range) -> None:
    for step in steps:
        pipe.step(*CASES[name].views(step, 4), seed=step)
    pipe.flush()


def train_single(model: LocalWrapper, optimizer: torch.optim.Optimizer, name: str, steps: range) -> None:
    for step in steps:
        model.local_step(*CASES[name].views(step, 4), seed=step)
        optimizer.step()
        optimizer.zero_grad()


def state_travels(name: str, layouts: list[list[int]], rank: int, folder: str) -> list[float]:
    """Pipeline -> one process -> another layout -> the first layout, two steps in each; against one process throughout."""
    one = single(CASES[name])
    optimizer = adamw([*one.parameters()])
    worst = []
    pipe = pipeline(CASES[name], layouts[0], adamw)
    train(pipe, name, range(2))
    train_single(one, optimizer, name, range(2))
    worst.append(off(pipe, one))
    dcp.save(pipe.state_dict(), checkpoint_id=f"{folder}/a")

    other = single(CASES[name])
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    again = adamw([*other.parameters()])
    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, again, options=FLAT)}
    dcp.load(state, checkpoint_id=f"{folder}/a", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, again, state["optimizer"], options=FLAT)
    train_single(other, again, name, range(2, 4))
    train_single(one, optimizer, name, range(2, 4))
    worst.append(
        max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    )

    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, again, options=FLAT)}
    dcp.save(state, checkpoint_id=f"{folder}/b")
    for end, (layout, before) in enumerate(zip((layouts[1], layouts[0]), "bc", strict=True), 4):
        pipe = pipeline(CASES[name], layout, adamw)
        with torch.no_grad():
            for weight in pipe.optimizer.param_groups[0]["params"]:
                weight.zero_()
        state = pipe.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{before}")
        pipe.load_state_dict(state)
        train(pipe, name, range(end, end + 1))
        train_single(one, optimizer, name, range(end, end + 1))
        worst.append(off(pipe, one))
        dcp.save(pipe.state_dict(), checkpoint_id=f"{folder}/{chr(ord(before) + 1)}")
    return worst


def clipped(rank: int) -> list[float]:
    """The norm, and the weights after clipping by it; a second norm type, and a norm that is below."""
    one, worst = single(CASES["resnet50"]), []
    optimizer, pipe = sgd([*one.parameters()]), pipeline(CASES["resnet50"], [1, 3])
    for step, (largest, kind) in enumerate(((0.1, 2.0), (0.1, float("inf")), (1e6, 2.0))):
        given = CASES["resnet50"].views(step, 4)
        one.local_step(*given)
        pipe.local_step(*given)
        wanted = nn.utils.clip_grad_norm_(one.parameters(), largest, kind)
        norm = pipe.clip_grad_norm_(largest, kind)
        assert (norm > largest) == (step < 2)
        worst.append(float((norm - wanted).abs()))
        for any_optimizer in (optimizer, pipe.optimizer):
            any_optimizer.step()
            any_optimizer.zero_grad()
        worst.append(off(pipe, one))
    pipe.flush()
    return worst


def accumulated(rank: int) -> float:
    """Two batches before one step of the optimiser, and a flush in between."""
    one = single(CASES["loco"])
    optimizer, pipe = sgd([*one.parameters()]), pipeline(CASES["loco"], [2, 2])
    for step in range(4):
        given = CASES["loco"].views(step, 4)
        one.local_step(*given)
        pipe.local_step(*given) if step % 2 == 0 else pipe.step(*given)
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
            pipe.flush()
            pipe.flush()
    return off(pipe, one)


class Labelled(nn.Module):
    """A loss that reads a tree of targets, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(16, 5)

    def forward(self, *outputs: Any) -> Tensor:
        *outputs, targets = outputs
        losses = [nn.functional.cross_entropy(self.classes(output), targets["labels"]) for output in outputs]
        return sum(losses) * targets["weight"]  # type: ignore[return-value]


def beside(one: LocalWrapper, pipe: Pipeline, batches: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference of a pipeline to one process, after a step on each of these batches."""
    optimizer = sgd([*one.parameters()])
    for given in batches:
        one.local_step(*given)
        pipe.step(*given)
        optimizer.step()
        optimizer.zero_grad()
    pipe.flush()
    return off(pipe, one)


def supervised(rank: int) -> float:
    def build() -> LocalWrapper:
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4))
        loss = [Labelled() for _ in range(3)]
        return LocalWrapper(net, [0, 1, 2, 3], decoder=small, example=torch.rand(2, 3, 8, 8), loss=loss)

    one = build()
    optimizer = sgd([*one.parameters()])
    pipe = Pipeline(build(), [2, 2], sgd, example=torch.rand(2, 3, 8, 8))
    for step in range(3):  # one view, then two, then three
        given = torch.rand(step + 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).unbind()
        targets = {"labels": torch.arange(4) % 5, "weight": 2.0 + step}
        one.local_step(*given, targets=targets)
        pipe.step(*given, targets=targets) if rank == 0 else pipe.step()
        optimizer.step()
        optimizer.zero_grad()
    pipe.flush()
    return off(pipe, one)


def function(rank: int) -> float:
    """A loss that is a function around `info_nce`, in which no module says that other ranks' rows are not to be gathered."""

    def build(**options: Any) -> LocalWrapper:
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4))
        loss = lambda a, b: info_nce(a, b, temperature=0.5, **options)  # noqa: E731
        return LocalWrapper(net, [0, 1, 2, 3], decoder=small, example=torch.rand(2, 3, 8, 8), loss=loss)

    pipe = Pipeline(build(), [2, 2], sgd, example=torch.rand(2, 3, 8, 8), timeout=timedelta(seconds=60))
    return beside(build(gather=False), pipe, [CASES["loco"].views(step, 4) for step in range(3)])


def untrained(rank: int) -> bool:
    """Whether a checkpoint of a plan that trains no weight of stage 2 has the names that a new pipeline asks it for."""
    plan = Plan(4, [Unit(0, 1), Unit(2, 3, updates=[3])])

    def build() -> Pipeline:
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4))
        model = LocalWrapper(net, [0, 1, 2, 3], decoder=small, example=torch.rand(2, 3, 8, 8), plan=plan)
        return Pipeline(model, [2, 2], adamw, example=torch.rand(2, 3, 8, 8))

    pipe = build()
    pipe.step(*CASES["loco"].views(0, 4))
    pipe.flush()
    return pipe.state_dict()["optimizer"].keys() == build().state_dict()["optimizer"].keys()


def in_bf16(rank: int) -> tuple[float, int, int]:
    """The difference to one process under autocast, and the bytes that a step sends, without and with it."""
    case = CASES["loco"]
    sent, worst = [], 0.0
    for precise in (True, False):
        one, pipe = (
            single(case).float(),
            Pipeline(case.build().float(), [2, 2], sgd, example=torch.rand(2, 3, 8, 8).float()),
        )
        optimizer = sgd([*one.parameters()])
        for step in range(3):
            given = [view.float() for view in case.views(step, 64)]
            before = pipe.bytes_sent
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                one.local_step(*given)
                pipe.step(*given)
            optimizer.step()
            optimizer.zero_grad()
        sent.append(pipe.bytes_sent - before)
        pipe.flush()
        worst = max(worst, off(pipe, one))
    return worst, *sent  # type: ignore[return-value]


def channels_last(rank: int) -> float:
    case = CASES["resnet50"]
    one = single(case).to(memory_format=torch.channels_last)
    pipe = Pipeline(case.build().to(memory_format=torch.channels_last), [2, 2], sgd, example=torch.rand(2, 3, 32, 32))
    views = [[v.contiguous(memory_format=torch.channels_last) for v in case.views(step, 4)] for step in range(2)]
    return beside(one, pipe, views)


def held(rank: int) -> tuple[set[str], int, int]:
    """What this rank holds of a ResNet: names, bytes, and bytes of the whole."""
    model = cases.resnet50()
    whole = sum(t.nbytes for t in model.state_dict().values())
    pipe = Pipeline(model, [2, 2], sgd, example=torch.rand(2, 3, 32, 32))
    state = {name: t for name, t in pipe.model.state_dict().items() if not t.is_meta}
    assert state.keys() == pipe.state_dict()["model"].keys()
    return set(state), sum(t.nbytes for t in state.values()), whole


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


class Skips(cases.Encoder):
    """A layer reads the words' embedding, which does not pass the cut."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        first = x.detach()
        for layer in self.layers:
            x = layer(x) + first
        return x


class Counted(nn.Module):
    """A frozen buffer that two stages write to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b, self.c, self.d):
            self.runs += 1
            x = part(x)
        return x


def refused(rank: int) -> dict[str, str]:
    loco = CASES["loco"]
    four = nn.Sequential(*(conv(3 if k == 0 else 4, 4) for k in range(4)))

    def wrapped(net: nn.Module = four, stages: Any = (0, 1, 2, 3), **options: Any) -> LocalWrapper:
        options = {"decoder": small, "example": torch.rand(2, 3, 8, 8)} | options
        return LocalWrapper(net, list(stages), **options)

    def tried(model: Any, ranks: Any = (2, 2), **options: Any) -> str:
        options = {"example": torch.rand(2, 3, 8, 8)} | options
        return error(lambda: Pipeline(model, ranks, sgd, **options))

    one = small(4)
    found = {
        "stages": tried(loco.build(), [2, 1]),
        "bool": tried(loco.build(), [True, 3]),
        "processes": tried(loco.build(), [2, 1, 1]),
        "mode": tried(loco.build(), mode="fast"),
        "ddp": tried(DistributedDataParallel(loco.build())),
        "backbone": tried(four),
        "soft": tried(wrapped(sharing=Soft())),
        "decoder": tried(wrapped(decoder=[one, one, one])),
        "loss": tried(wrapped(loss=Labelled())),
        "gather": tried(wrapped(loss=InfoNCE(gather=True))),
        "rows of a group": tried(wrapped(loss=InfoNCE(group=dist.group.WORLD))),
        "checkpoint": tried(wrapped(checkpoint=nn.Conv2d)),
        "eager": tried(CASES["overlap 2"].build(), [3, 2], mode="eager"),
        "schedule": tried(wrapped(schedule=fused)),
        "optimizer": error(lambda: Pipeline(loco.build(), [2, 2], sgd if rank == 0 else adamw_of_nothing)),
        "no optimizer": error(lambda: Pipeline(loco.build(), [2, 2], lambda weights: None)),  # type: ignore[arg-type]
        "others": error(lambda: Pipeline(loco.build(), [2, 2], lambda weights: sgd([nn.Parameter(torch.ones(1))]))),
        "width": tried(wrapped(decoder=lambda width: MLPDecoder(width, out_features=4 + rank))),
        "one rank": tried(loco.build(), [2, 2] if rank else [3, 1]),
    }
    torch.manual_seed(0)
    words = cases.tokens(0, 2)[0]
    skips = LocalWrapper(Skips(), [f"layers.{k}" for k in range(4)], decoder=TokenDecoder, example=words)
    found["skip"] = tried(skips, example=words)
    alone = [dist.new_group([other]) for other in range(2)][rank]
    found["group"] = tried(loco.build(), [4], group=alone)
    pipe = pipeline(loco, [2, 2])
    found["around"] = error(lambda: DistributedDataParallel(pipe))
    with torch.no_grad():
        found["no_grad"] = error(lambda: pipe.step(*loco.views(0, 4)))
    with torch.autocast("cpu", torch.float16):
        found["fp16"] = error(lambda: pipe.step(*loco.views(0, 4)))
    pipe.flush()
    eager = pipeline(loco, [2, 2], mode="eager")
    eager.step(*loco.views(0, 4))
    found["not flushed"] = error(eager.state_dict) if rank == 0 else REFUSALS["not flushed"]
    found["load"] = error(lambda: eager.load_state_dict({})) if rank == 0 else REFUSALS["load"]
    eager.flush()
    counted = LocalWrapper(Counted(), ["a", "b", "c", "d"], decoder=MLPDecoder, example=torch.rand(2, 3))
    found["written"] = error(
        lambda: Pipeline(counted, [2, 2], sgd, example=torch.rand(2, 3)).step(*torch.rand(2, 4, 3))
    )
    tied = Pipeline(
        LocalWrapper(Tied(), list("abcd"), decoder=MLPDecoder, example=torch.rand(2, 3)),
        [2, 2],
        sgd,
        example=torch.rand(2, 3),
    )
    tied.step(*torch.rand(2, 4, 3))
    tied.flush()
    tied.model.backbone.scale.requires_grad_(True)
    found["unfrozen"] = error(lambda: tied.step(*torch.rand(2, 4, 3)))
    if rank:  # whom rank 0's error may reach first
        found["unfrozen"] = REFUSALS["unfrozen"]
    return found


def adamw_of_nothing(weights: Any) -> torch.optim.Optimizer:
    raise ValueError("no learning rate")


class Tied(Counted):
    """All stages read one frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b, self.c, self.d):
            x = part(x * self.scale)
        return x


def waits(rank: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(CASES["loco"], [1, 3])
        pipeline(CASES["gim"], [1, 3])
    return [str(one.message) for one in caught]


def work(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"waits": waits(rank)}
    warnings.filterwarnings("ignore", message="rank . has . of the stages")
    found["state"] = state_travels("loco", [[2, 2], [1, 3]], rank, f"{folder}/loco")
    found["state of resnet"] = state_travels("resnet50", [[3, 1], [2, 2]], rank, f"{folder}/resnet")
    for check in (clipped, accumulated, supervised, function, untrained, in_bf16, channels_last, held, refused):
        found[check.__name__] = check(rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return processes.run(work, 2, folder, str(folder))


def test_a_checkpoint_moves_between_layouts_and_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["state"] == [0.0] * 4
        assert rank["state of resnet"] == [0.0] * 4


@pytest.mark.parametrize("check", ["accumulated", "supervised", "function", "channels_last"])
def test_weights_are_those_of_one_process(check: str, found: list[dict[str, Any]]) -> None:
    """After two batches in one step; with a tree of targets and changing numbers of views; with channels last."""
    assert [rank[check] for rank in found] == [0.0, 0.0]


def test_a_checkpoint_has_what_a_new_pipeline_asks_for_where_a_stage_is_not_trained(
    found: list[dict[str, Any]],
) -> None:
    assert [rank["untrained"] for rank in found] == [True, True]


def test_a_rank_that_does_not_come_is_told_in_one_error() -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer\nand more")

    with pytest.raises(
        PipelineError, match=r"has not come to clip for 3 s \(torch says: Connection closed by peer\)\. Start"
    ):
        together(lost, "to clip", timedelta(seconds=3))


def test_clipping_is_by_the_norm_of_the_whole_model(found: list[dict[str, Any]]) -> None:
    assert [rank["clipped"] for rank in found] == [[0.0] * 6] * 2


def test_autocast_sends_half_the_bytes(found: list[dict[str, Any]]) -> None:
    for rank in found:
        off_by, single, half = rank["in_bf16"]
        assert off_by == 0
        assert single / 2 < half < single / 2 + 500  # headers


def test_a_rank_holds_its_own_part(found: list[dict[str, Any]]) -> None:
    (lower, few, whole), (upper, rest, _) = (rank["held"] for rank in found)
    assert few + rest == whole
    assert not lower & upper
    assert {"backbone.conv1.weight", "backbone.layer2.3.bn3.num_batches_tracked", "decoders.0.mlp.0.bias"} <= lower
    assert {"backbone.layer3.0.conv1.weight", "backbone.fc.weight", "decoders.2.mlp.0.bias"} <= upper


REFUSALS = {
    "stages": "ranks says how many stages each process owns, at least one, 4 in all, such as ranks=[2, 2]; got [2, 1]",
    "bool": "got [True, 3]",
    "processes": "got [2, 1, 1] for 2 processes",
    "mode": "mode is 'exact' or 'eager'; got 'fast'",
    "eager": "in eager mode one unit spans a boundary, by the stage below it alone",
    "not flushed": "RuntimeError: in eager mode the last gradient of the highest stage is still to be applied",
    "ddp": "TypeError: data parallel and pipeline do not go together yet",
    "backbone": "TypeError: a Pipeline divides up a LocalWrapper; got Sequential",
    "soft": "the penalty of Soft ties stages of several ranks together",
    "decoder": "'decoders.0.mlp.0.weight', of a decoder or a loss, is used by units of ranks [0, 1]",
    "loss": "'loss.classes.weight', of a decoder or a loss, is used by units of ranks [0, 1]",
    "gather": "InfoNCE takes other ranks' rows, which are of other stages in a pipeline",
    "rows of a group": "InfoNCE takes other ranks' rows, which are of other stages in a pipeline",
    "schedule": "a pipeline has an order of its own, and takes no schedule=",
    "optimizer": "on rank 1: optimizer= fails: ValueError: no learning rate",
    "no optimizer": "optimizer= makes a torch.optim.Optimizer of the weights that it is given; got None",
    "others": "optimizer= has other weights than those that it is given",
    "width": "ranks [1] have built another model than rank 0",
    "load": "call flush() first",
    "unfrozen": "frozen when the pipeline was built, and now it is trained",
    "checkpoint": "checkpoint= does not go with a pipeline yet",
    "one rank": "ranks [1] were given other stages, another plan, ranks= or mode= than rank 0",
    "skip": "Skips does not run by itself from the outlet of stage 1 to that of stage 3",
    "group": "data parallel times pipeline is not there yet",
    "around": "TypeError: data parallel and pipeline do not go together yet",
    "no_grad": "RuntimeError: a pipeline trains, and gradients are disabled here",
    "fp16": "RuntimeError: fp16 needs one loss scale on all ranks",
    "written": "stages of several ranks read ['backbone.runs'], and a forward has changed it",
}


def test_what_does_not_fit_is_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["refused"]
        assert told.keys() == REFUSALS.keys()
        assert not {case: error for case, error in told.items() if REFUSALS[case] not in error}


def test_a_rank_with_too_few_stages_is_told_that_it_will_wait(found: list[dict[str, Any]]) -> None:
    (one,), none = (rank["waits"] for rank in found)
    assert "rank 0 has 1 of the stages; with overlap 1 it needs 2" in one
    assert "mode='eager'" in one
    assert not none
