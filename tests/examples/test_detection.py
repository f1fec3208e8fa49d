"""Mask R-CNN on locally learned backbones: what is frozen, what is measured, and the whole path from pretraining to a picture."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import backbones
import coco_on_the_spot
import compare
import detector
import draw
import options
import precision
import pretrain
import pyramid
import reports
import segment
import train
from coco import parts, read_coco
from inputs.images import DataError
from instances import InstanceSet, Photo, boxes_of, labels_of, masks_of
from PIL import Image
from pretraining.processes import Processes
from pretraining.runs import checkpoints, read_settings, save_checkpoint, write_settings
from reading.encoders import Encoder
from saved import load_detector
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN

from locallearn.models import presnet50, presnet_small, shufflenet_v2_50

CPU = torch.device("cpu")
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Small(nn.Module):
    """Four convolutions of stride 2, under the names of a ResNet's stages, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        for stage, (before, after) in zip(STAGES, ((3, 4), (4, 6), (6, 8), (8, 10)), strict=True):
            self.add_module(stage, nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        for stage in STAGES:
            x = self.get_submodule(stage)(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def float32_and_a_small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(backbones.ARCHITECTURES, "small", backbones.Architecture(lambda size: Small(), STAGES))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_on_the_spot.make(tmp_path_factory.mktemp("data") / "coco")


def encoder_of(backbone: nn.Module, stages: tuple[str, ...] = STAGES) -> Encoder:
    half = (0.5, 0.5, 0.5)
    return Encoder("small", "small", backbone, stages, 64, half, half, Path("none"), {})


SIZE = detector.Size(width=16, hidden=16, rois=16, shorter=(64,), longest=128)
TINY = ["--shorter", "64", "--width", "16", "--hidden", "16", "--rois", "16", "--batch-size", "2", "--device", "cpu"]


RANDOM = ["--arch", "small", "--random"]


def arguments(coco: Path, out: Path, *more: str) -> list[str]:
    """What train.py needs beside its backbone."""
    return ["--data", str(coco), "--out", str(out), *TINY, *more]


# ------------------------------------------------------------------------------------------------------- the backbone


def trained_for_two_steps(coco: Path, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A detector's state before and after."""
    args = options.parser().parse_args(RANDOM + arguments(coco, Path("unused"), "--mode", mode, "--lr", "0.1"))
    found = read_coco(*parts(coco)["train"])
    options.complete(args, found, 1)
    training = train.new_training(args, encoder_of(Small()), len(found.classes))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.train()
    draws = [(seed, torch.tensor([2 * seed, 2 * seed + 1])) for seed in range(2)]
    for images, targets in train.training_batches(found.photos, draws, CPU, 0):
        losses = train.step(args, training, training.model, images, targets)
        assert losses.isfinite().all()
        training.optimizer.param_groups[0]["lr"] = 0.1
    return before, training.model.state_dict()


@pytest.mark.parametrize(
    ("mode", "still"),
    [("frozen", STAGES), ("finetune", STAGES[:1]), ("scratch", ())],
    ids=["frozen", "finetune", "scratch"],
)
def test_frozen_stages_keep_every_bit_and_batchnorms_statistics_and_all_others_learn(
    coco: Path, mode: str, still: tuple[str, ...]
) -> None:
    before, after = trained_for_two_steps(coco, mode)
    body = "backbone.body.backbone."
    for name, value in after.items():
        if "num_batches_tracked" in name and not name.startswith(body):
            continue
        stage = name.removeprefix(body).split(".")[0] if name.startswith(body) else "new"
        changed = not torch.equal(value, before[name])
        assert changed == (stage not in (*still, "fc")), name


def test_every_new_convolution_is_normalised_and_the_box_head_has_four_and_one_fc() -> None:
    model = detector.mask_rcnn(encoder_of(Small()), 3, "frozen", SIZE, CPU)
    heads = model.roi_heads
    for new, convolutions in ((model.backbone.fpn, 8), (heads.box_head, 4), (heads.mask_head, 4)):
        leaves = [module for module in new.modules() if not list(module.children())]
        behind = [type(after) for before, after in pairwise(leaves) if isinstance(before, nn.Conv2d)]
        assert behind == convolutions * [nn.BatchNorm2d]
    assert [type(m) for m in heads.box_head.modules() if isinstance(m, nn.Linear)] == [nn.Linear]
    assert heads.box_predictor.cls_score.out_features == 4  # three classes and the background


def test_on_gpus_the_new_normalisation_is_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskRCNN, "to", lambda model, device: model)
    model = detector.mask_rcnn(encoder_of(Small()), 3, "finetune", SIZE, torch.device("cuda"))
    norms = [type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms == (4 + 8 + 4 + 4) * [nn.SyncBatchNorm]
    model.train()
    lowest, above = (model.backbone.body.backbone.get_submodule(stage) for stage in STAGES[:2])
    assert [lowest[1].training, above[1].training] == [False, True]


@pytest.mark.parametrize(
    ("backbone", "stages", "strides", "chosen"),
    [
        (resnet18, STAGES, (4, 8, 16, 32), STAGES),
        (
            shufflenet_v2_50,
            ("stage2", "stage3", "stage4", "conv6"),
            (4, 8, 16, 32),
            ("stage2", "stage3", "stage4", "conv6"),
        ),
        (presnet50, (*STAGES, "layer5", "layer6"), (4, 8, 16, 32), ("layer1", "layer3", "layer4", "layer6")),
        (presnet_small, (*STAGES, "layer5", "layer6"), (1, 2, 4, 8), ("layer1", "layer2", "layer4", "layer6")),
    ],
    ids=["resnet18", "shufflenet_v2_50", "presnet50", "presnet_small"],
)
def test_a_pyramids_strides_are_powers_of_two_on_any_backbone(
    backbone: Any, stages: tuple[str, ...], strides: tuple[int, ...], chosen: tuple[str, ...]
) -> None:
    network = backbone()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    body = pyramid.Body(network, stages, "finetune").train()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert body.strides == strides
    assert body._stages == list(chosen)
    maps = body.eval()(torch.zeros(1, 3, 64, 96))
    sizes = {
        str(k): (1, width, 64 // s, 96 // s) for k, (width, s) in enumerate(zip(body.widths, strides, strict=True))
    }
    assert {name: tuple(level.shape) for name, level in maps.items()} == sizes
    assert not any(weight.requires_grad for weight in network.fc.parameters())  # nothing there reaches a loss
    assert network.get_submodule(stages[-1]).training is False
    body.train()
    stem = {id(m) for name, m in network.named_modules() if name.startswith((stages[0], "conv1", "bn1"))}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (id(module) not in stem)


# ---------------------------------------------------------------------------------------------------------- precision


class Guesses(nn.Module):
    """Finds each image's instances, or where they are shifted, each three times, somewhat off and now and then as another."""

    def __init__(self, found: InstanceSet, shift: int) -> None:
        super().__init__()
        self.photos, self.shift, self.asked = found.photos, shift, 0
        self.given: list[tuple[Photo, dict[str, Tensor]]] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        photo = self.photos[self.asked]
        self.asked += 1
        objects = photo.instances * (3 if self.shift else 1)
        shifts = [k % 5 * self.shift for k in range(len(objects))]
        masks = masks_of(objects, photo)
        moved = torch.stack([mask.roll(shift, dims=1) for mask, shift in zip(masks, shifts, strict=True)])
        boxes = boxes_of(objects) + torch.tensor(shifts)[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
        labels = labels_of(objects)
        if self.shift:
            labels[::4] = 1
        scores = torch.rand(len(objects), generator=torch.Generator().manual_seed(self.asked))
        given = {"boxes": boxes, "labels": labels, "scores": scores, "masks": moved[:, None].float()}
        self.given.append((photo, {name: value.clone() for name, value in given.items()}))
        return [given]


def sized(coco: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The held-out part with areas that are small, medium and large to COCO, as its json says."""
    folder, file = parts(coco)["val"]
    contents = json.loads(file.read_text())
    for one, factor in zip(contents["annotations"], (1, 4, 40) * 10, strict=False):
        one["area"] *= factor
    (tmp_path / "val.json").write_text(json.dumps(contents))
    return folder, tmp_path / "val.json"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under numpy 2
def test_average_precision_is_that_of_pycocotools(coco: Path, tmp_path: Path) -> None:
    """Boxes and masks, all six figures, crowds and areas as the json has them."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import encode

    folder, file = sized(coco, tmp_path)
    found = read_coco(folder, file)
    guesses = Guesses(found, shift=2)
    measured = precision.average_precision(guesses, found, CPU)

    truth, results = pycocotools.COCO(str(file)), []
    for photo, given in guesses.given:
        for box, label, score, mask in zip(
            *(given[name] for name in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            packed = encode(np.asfortranarray(mask[0].byte().numpy()))
            packed["counts"] = packed["counts"].decode()
            category = coco_on_the_spot.CATEGORIES[int(label) - 1]["id"]
            result = {"image_id": photo.id, "category_id": category, "score": score.item(), "segmentation": packed}
            results.append(result | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        # without the box, a mask's own area sorts a detection into small, medium and large, as COCO's server does
        submitted = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in results]
        evaluation = COCOeval(truth, truth.loadRes(submitted), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected = dict(zip(precision.FIGURES, evaluation.stats[:6].tolist(), strict=True))
        assert measured[name] == pytest.approx(expected, abs=1e-6)
        assert 0.05 < expected["AP"] < expected["AP50"] < 1


def test_perfect_detections_have_precision_one_and_none_has_zero(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_coco(*parts(coco)["val"])
    perfect = precision.average_precision(Guesses(found, shift=0), found, CPU)
    assert perfect["box"]["AP50"] == perfect["mask"]["AP75"] == 1
    monkeypatch.setattr(precision, "detections", lambda model, image: precision.nothing())
    none = precision.average_precision(Guesses(found, shift=0), found, CPU)
    assert none["box"]["AP"] == none["mask"]["AP"] == 0


def test_several_processes_measure_what_one_does(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_coco(*parts(coco)["train"])
    model = Guesses(found, shift=2)
    alone = precision.average_precision(model, found, CPU)
    given = {photo.id: detected for photo, detected in model.given}

    def detections(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        detected = given[next(asked)]
        return {**detected, "masks": detected["masks"].squeeze(1) >= 0.5}

    def all_gather(parts: list[Any], mine: list[Any]) -> None:
        parts[rank], parts[1 - rank] = mine, other.pop(0) if other else []

    states: list[list[Any]] = []
    gather = precision.gather
    monkeypatch.setattr(precision, "detections", detections)
    for rank in (1, 0):
        asked = iter([photo.id for photo in found.photos[rank::2]])
        other = [list(value) for value in states]
        monkeypatch.setattr(precision.dist, "all_gather_object", all_gather)

        def remembering(metric: Any, processes: Processes) -> None:
            if not states:
                states.extend(metric.metric_state.values())
            gather(metric, processes)

        monkeypatch.setattr(precision, "gather", remembering)
        together = precision.average_precision(nn.Identity(), found, CPU, Processes(rank, 2, rank))
        assert (together == {}) == (rank == 1)
    assert together == alone


# ---------------------------------------------------------------------------------------------------------- schedules


def test_the_schedules_are_the_papers(coco: Path) -> None:
    found = read_coco(*parts(coco)["train"])  # six images

    def completed(*argv: str) -> argparse.Namespace:
        args = options.parser().parse_args(["--random", "--arch", "small", *argv])
        options.complete(args, found, 1)
        return args

    few = completed("--schedule", "coco-1k", "--batch-size", "4")
    assert few.steps == 60_000  # 15,000 steps of 16 images
    assert few.lr == 0.005
    assert few.drops == [40_000, 53_333]
    assert few.shorter == [640, 672, 704, 736, 768, 800]
    assert few.longest == 1333
    cityscapes = completed("--schedule", "cityscapes", "--batch-size", "2")
    assert cityscapes.steps == 64 * 3
    assert cityscapes.drops == [56 * 3, 56 * 3]
    assert (cityscapes.shorter[0], cityscapes.shorter[-1], cityscapes.longest) == (800, 1024, 2048)
    once = completed("--batch-size", "2")
    assert (once.steps, once.drops, once.shorter) == (36, [24, 33], [800])
    training = train.new_training(
        argparse.Namespace(**{**vars(once), "warm_up": 10, "device": CPU, "width": 8, "hidden": 8}),
        encoder_of(Small()),
        3,
    )
    rates = []
    for _ in range(36):
        rates.append(training.optimizer.param_groups[0]["lr"] / once.lr)
        training.optimizer.step()
        training.scheduler.step()
    assert rates[0] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx((1 + 1e-3) / 2)
    assert rates[10:24] == [1] * 14
    assert rates[24:33] == pytest.approx([0.1] * 9)
    assert rates[33:] == pytest.approx([0.01] * 3)


def test_a_row_stands_beside_the_papers_figures_of_its_own_setting() -> None:
    def paper(backbone: str, mode: str = "frozen", schedule: str = "1x", data: str = "instances_val2017") -> str:
        return reports.of_the_paper({"backbone": backbone, "mode": mode, "schedule": schedule, "data": data})[1]

    assert paper("LoCo") == "34.5/32.0"
    assert paper("cifar-loco-0") == "34.5/32.0"
    assert paper("resnet50-IMAGENET1K_V1", data="cityscapes val") == "33.2/27.1"
    assert paper("random", "scratch", "coco-1k") == "2.5/2.5"
    assert paper("Greedy InfoMax", "finetune", "coco-10k") == "24.4/22.4"
    assert paper("random") == ""


# ------------------------------------------------------------------------------------------------------ the whole path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of pretrain.py: two steps of LoCo on noise."""
    torch.set_default_dtype(torch.float32)
    directory = tmp_path_factory.mktemp("runs")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(8) % 2
    np.savez(directory / "noise.npz", x_train=pixels, x_test=pixels, y_train=labels, y_test=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.ARCHITECTURES, "small", backbones.Architecture(lambda size: Small(), STAGES))
        argv = ["--data", f"npz:{directory / 'noise.npz'}", "--arch", "small", "--method", "loco", "--decoder", "mlp"]
        argv += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--out", str(directory / "loco-pretrained")]
        assert pretrain.main(argv) == 0
    return directory / "loco-pretrained"


def test_from_pretraining_to_a_table_and_a_picture(
    coco: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detection"
    argv = [str(pretrained), *arguments(coco, out, "--epochs", "1", "--log-every", "1")]
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    for kind in ("box", "mask"):
        assert list(results[kind]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        assert all(-1 <= value <= 1 for value in results[kind].values())
    assert "34.5" in printed  # the paper's, of LoCo
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(len(line["losses"]) == 5 for line in lines)

    model, settings = load_detector(out, CPU)
    assert settings["classes"] == ["disc", "square", "triangle"]
    own = torch.load(pretrained / "backbone.pt", weights_only=True)
    for name, value in model.backbone.body.backbone.state_dict().items():
        assert torch.equal(value, own[name]), name  # frozen from the first file to the last

    assert train.main([*argv, "--resume", "auto"]) == 0
    assert capsys.readouterr().out == f"{out} is finished\n"

    picture = tmp_path / "figure.png"
    shown = [
        f"LoCo={out}",
        f"again={out}",
        "--data",
        str(coco),
        "--out",
        str(picture),
        "--threshold",
        "0",
        "--count",
        "2",
    ]
    assert draw.main([*shown, "--device", "cpu"]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 300  # three columns, two rows
        left, middle, right = (
            np.asarray(drawn.crop((k * drawn.width // 3, 80, (k + 1) * drawn.width // 3, drawn.height))).std()
            for k in range(3)
        )
    assert min(left, middle, right) > 5


def test_compare_gives_every_backbone_the_same_budget_and_one_table(
    coco: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    rest = ["--data", str(coco), "--merge", "all", "--epochs", "1", *TINY]
    for seed in range(2):
        (tmp_path / f"run-{seed}").symlink_to(pretrained)
    argv = [f"LoCo={tmp_path}/run-{{seed}}", "random", "--seeds", "2", "--out", str(out), "--", *rest]
    assert compare.main(argv) == 0
    printed = capsys.readouterr().out
    rows = json.loads((out / "comparison.json").read_text())
    assert [(row["backbone"], row["seed"]) for row in rows] == [("LoCo", 0), ("random", 0), ("LoCo", 1), ("random", 1)]
    assert {row["steps"] for row in rows} == {3}
    assert re.search(r"\| LoCo \| \d+\.\d\d ± \d+\.\d\d \|.*\| 34\.5/32\.0 \|", printed)
    settings = [json.loads((out / f"{name}-seed0/run.json").read_text()) for name in ("LoCo", "random")]
    assert settings[0]["classes"] == ["object"]
    again = json.loads((out / "LoCo-seed1/run.json").read_text())
    assert (settings[0]["backbone"], again["backbone"]) == ("run-0", "run-1")
    differing = {key for key in settings[0] if settings[0][key] != settings[1].get(key)}
    assert differing <= {"backbone", "seconds"}
    with pytest.raises(SystemExit):
        compare.main([*argv, "--seed", "1"])
    assert "--seed is chosen by compare.py" in capsys.readouterr().err

    shown = ["--data", str(coco), "--out", str(tmp_path / "merged.png"), "--device", "cpu", "--count", "1"]
    runs = [f"LoCo={out}/LoCo-seed0", f"random={out}/random-seed0"]
    assert draw.main([*runs, *shown]) == 0  # the runs tell that classes were merged
    other = out / "random-seed0/run.json"
    other.write_text(json.dumps(settings[1] | {"classes": ["cat"]}))
    with pytest.raises(SystemExit):
        draw.main([*runs, *shown])
    told = capsys.readouterr().err
    assert "random-seed0 detects 1 class (cat), but" in told
    assert "has 1 class (object): draw runs of the same --data and --merge together" in told


def test_segmentation_reads_out_every_stage(
    coco: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(pretrained), "--data", str(coco), "--size", "32", "--epochs", "60", "--batch-size", "3", "--lr", "0.1"]
    argv += ["--merge", "all", "--out", str(tmp_path), "--device", "cpu"]
    assert segment.main(argv) == 0
    results = json.loads((tmp_path / "segment.json").read_text())
    assert results["stages"] == list(STAGES)
    assert results["classes"] == ["background", "object"]
    assert results["miou"][0] > 0.6  # bright shapes on grey: random colours of the first stage tell them
    assert "layer4" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- stop and go


def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--mode", "finetune", "--epochs", "2", "--checkpoint-every", "1", "--log-every", "1"]
    more += ["--shorter", "48", "64"]  # multi-scale: sizes are drawn, too
    assert train.main(RANDOM + arguments(coco, whole, *more)) == 0

    save = train.save_checkpoint

    def save_and_interrupt(directory: Path, step: int, state: dict[str, Any]) -> None:
        save(directory, step, state)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_interrupt)
        assert train.main(RANDOM + arguments(coco, broken, *more)) == 130
    torch.rand(7)  # the state of the random numbers is another one by then
    assert train.main(RANDOM + arguments(coco, broken, *more, "--resume", "auto")) == 0
    one, other = (torch.load(out / "detector.pt", weights_only=True) for out in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        [json.loads(line)["losses"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, broken)
    ]
    assert logs[0] == logs[1]
    results = [json.loads((out / "results.json").read_text()) for out in (whole, broken)]
    assert results[0]["box"] == results[1]["box"]

    save_checkpoint(broken, 99, torch.load(checkpoints(broken)[0], weights_only=True) | {"step": 99})
    write_settings(broken, {name: value for name, value in read_settings(broken).items() if name != "seconds"})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(RANDOM + arguments(coco, broken, *more, "--resume", "auto"))
    assert re.search(r"the newest checkpoint of .*broken is of step 99; this run ends at \d+$", capsys.readouterr().err)


def test_half_precision_trains(coco: Path) -> None:
    args = options.parser().parse_args(RANDOM + arguments(coco, Path("unused"), "--amp", "bf16"))
    found = read_coco(*parts(coco)["train"])
    options.complete(args, found, 1)
    training = train.new_training(args, encoder_of(Small()), len(found.classes))
    ((images, targets),) = train.training_batches(found.photos, [(0, torch.tensor([0, 1]))], CPU, 0)
    losses = train.step(args, training, training.model.train(), images, targets)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert losses.min() > 0


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "nothing to read out: give a RUN, or --arch with --weights or --random"),
        ("nowhere", "there is no nowhere"),
        ("--arch small --random", "there is nothing to take images from: give --data DIR, or --train IMAGES JSON"),
        ("--arch small --random --data .", r"\. is not laid out as COCO is: it has 0 files .*"),
        ("--arch small --weights DEFAULT --image-size 32 --data .", "--image-size is for --random; .*"),
        ("--arch small --random --train . no.json", r"no.json cannot be read as json: .*No such file.*"),
        ("--arch small --random --data COCO --batch-size 7", "--batch-size 7 is larger than the 6 images of .*"),
        ("--arch small --random --data COCO --split file", "file is no list of splits.py"),
        (
            "--arch small --random --data COCO --batch-size 2 --shorter 64 --longest 32",
            "--longest 32 is less than --shorter 64",
        ),
        ("--arch small --random --data COCO --mode thawed", "argument --mode: invalid choice: 'thawed' .*"),
        ("--arch small --random --data COCO --epochs 1 --iterations 1", ".*not allowed with argument --epochs"),
    ],
)
def test_a_wrong_argument_is_one_line(
    coco: Path,
    argv: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no list")
    given = [str(coco) if each == "COCO" else each for each in argv.split()]
    with pytest.raises(SystemExit) as stopped:
        train.main([*given, "--device", "cpu"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {message}", line)


def test_a_directory_without_a_detector_is_named(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no run of examples/detection/train\.py"):
        load_detector(pretrained, CPU)
    with pytest.raises(DataError, match=r"there is no .*run\.json"):
        load_detector(tmp_path, CPU)
