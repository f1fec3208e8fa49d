"""Pretraining: a whole run, a killed one, two processes, mixed precision, collapse, and each error's line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("timm")
pytest.importorskip("tqdm")

import pretrain
from backbones import ARCHITECTURES
from pretraining import interrupt, norms, optimisers, pretrain_options, processes, progress, runs, training
from pretraining.draws import Draws, seed_of
from tiny_pretrain import TINY, Tiny, plain_view
from torch import Tensor, nn
from torchvision.models import resnet18

ROOT = Path(__file__).parents[2]


TIMES = ("images_per_second", "peak_bytes", "seconds")


@pytest.fixture(autouse=True)
def float32_and_a_tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Thirty grey images of noise: three batches of eight, and six that are left over."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12), dtype=np.uint8)
    labels = np.arange(30) % 3
    np.savez(tmp_path / "noise.npz", x_train=pixels, y_train=labels, x_test=pixels[:6], y_test=labels[:6])
    return tmp_path / "noise.npz"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    tiny = [
        "--arch",
        "tiny",
        "--decoder",
        "conv",
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]
    return ["--data", f"npz:{data}", *tiny, "--out", str(out), *more]


def log_without_times(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in runs.read_log(out)]


def same(one: Any, other: Any) -> bool:
    """Bit by bit, through lists and dicts; the time that it took excepted."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def assert_same_run(one: Path, other: Path) -> None:
    """The same log, weights, and everything in the last checkpoint."""
    assert log_without_times(one) == log_without_times(other)
    assert same(torch.load(one / "backbone.pt"), torch.load(other / "backbone.pt"))
    assert same(runs.newest_checkpoint(one), runs.newest_checkpoint(other))


# --------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_settings_log_and_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/er"
    assert pretrain.main(arguments(data, out, "--optimizer", "adamw", "--lr", "0.003")) == 0
    printed = capsys.readouterr().out
    assert "unit 0        #  #\nunit 1           #  #\n" in printed
    log = runs.read_log(out)
    table = printed.partition("loco: tiny, decoder conv, sharing hard, 3 epochs\n")[2]
    rows = [line.split()[:3] for line in table.splitlines() if re.match(r" *\d ", line)]
    assert rows == [[str(k), ("middle", "top")[k], f"{loss:.2f}"] for k, loss in enumerate(log[-1]["losses"])]
    assert re.search(rf"seconds\.\nwrote {out}/backbone.pt; read it out with: .*linear_eval.py {out}\n$", table)
    assert max(len(line) for line in table.splitlines() if "wrote" not in line) <= 80
    assert [line["step"] for line in log] == [*range(1, 10)]
    assert [line["epoch"] for line in log[2::3]] == [1, 2, 3]
    for line in log:
        assert [len(line[name]) for name in ("losses", "accuracy", "std")] == [2, 2, 2]
        assert line["images_per_second"] > 0
        assert line["peak_bytes"] > 1e7
    assert log[0]["lr"] < log[1]["lr"] > log[2]["lr"] > log[-1]["lr"] > 0
    settings = json.loads((out / "run.json").read_text())
    chosen = {
        "arch": "tiny",
        "image_size": 12,
        "method": "loco",
        "overlap": 1,
        "epochs": 3,
        "lr": 0.003,
        "processes": 1,
    }
    assert settings.items() >= chosen.items()
    assert settings["units"] == [[0, 1], [1, 2]]
    assert settings["mean"] == settings["std"] == [0.5, 0.5, 0.5]
    assert settings["seconds"] >= log[-1]["seconds"]
    assert {"versions", "machine", "commit", "images_per_second", "data_dir"} <= settings.keys()
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.pt",
        "checkpoint-00000009.pt",
        "log.jsonl",
        "run.json",
    ]
    assert runs.load(out).backbone(torch.zeros(2, 3, 12, 12)).shape == (2, 5)


def test_a_resnet_that_was_pretrained_loads_into_torchvisions_own(data: Path, tmp_path: Path) -> None:
    """Under 64 pixels the stem is another one, so this is at 65."""
    out = tmp_path / "out"
    more = [
        "--arch",
        "resnet18",
        "--decoder",
        "mlp",
        "--epochs",
        "1",
        "--image-size",
        "65",
        "--format",
        "safetensors",
        "--batch-size",
        "30",
    ]
    assert pretrain.main(arguments(data, out, *more)) == 0
    from safetensors.torch import load_file

    assert not (out / "backbone.pt").exists()
    resnet18().load_state_dict(load_file(out / "backbone.safetensors"), strict=True)


def test_nothing_behind_the_last_cut_is_trained(data: Path, tmp_path: Path) -> None:
    pretrain.main(arguments(data, tmp_path / "out", "--weight-decay", "0.1", "--optimizer", "sgd", "--lr", "0.1"))
    torch.manual_seed(0)
    start, end = Tiny().state_dict(), torch.load(tmp_path / "out/backbone.pt")
    assert torch.equal(start["fc.weight"], end["fc.weight"])
    assert torch.equal(start["fc.bias"], end["fc.bias"])
    assert not torch.equal(start["top.1.0.weight"], end["top.1.0.weight"])


def test_a_seed_fixes_everything_and_another_one_changes_it(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        pretrain.main(arguments(data, tmp_path / name, "--seed", str(seed), "--epochs", "1"))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert log_without_times(tmp_path / "a")[0]["losses"] != log_without_times(tmp_path / "c")[0]["losses"]


def test_a_supervised_contrastive_loss_is_given_the_labels(data: Path, tmp_path: Path) -> None:
    for loss in ("supcon", "nt-xent"):
        pretrain.main(arguments(data, tmp_path / loss, "--epochs", "1", "--loss", loss))
    assert runs.read_log(tmp_path / "supcon")[0]["losses"] != runs.read_log(tmp_path / "nt-xent")[0]["losses"]


def test_soft_sharing_logs_its_penalty(data: Path, tmp_path: Path) -> None:
    pretrain.main(arguments(data, tmp_path / "out", "--epochs", "1", "--sharing", "soft-1e-2", "--optimizer", "sgd"))
    penalties = [line["penalty"] for line in runs.read_log(tmp_path / "out")]
    assert penalties[0] == 0 < penalties[-1]


# -------------------------------------------------------------------------------------------------------- interruption


def interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    """Run `argv`, with Ctrl-C pressed in the middle of a step."""
    taken = training.Training.update

    def update(self: training.Training) -> float:
        if self.step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "update", update)
        return pretrain.main(argv)


def test_a_run_on_images_without_labels_says_that_its_read_out_needs_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: values * (name[0] == "x") for name, values in np.load(data).items()}
    np.savez(tmp_path / "unlabelled.npz", **arrays)
    argv = arguments(tmp_path / "unlabelled.npz", tmp_path / "out", "--epochs", "1")
    assert pretrain.main(argv) == 0
    ends = f"read it out on labelled images, by their NAME: python examples/linear_eval.py {tmp_path / 'out'} --data NAME\n"
    assert capsys.readouterr().out.endswith(ends)


def test_an_interrupted_run_says_how_to_go_on_and_ends_with_the_same_bits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, and between two lines of the log."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.main(arguments(data, whole, "--log-every", "4"))
    argv = arguments(data, broken, "--log-every", "4")
    capsys.readouterr()
    assert interrupted_after(5, monkeypatch, argv) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stopped and saved after step 5 of 9; go on with: ")
    again = shlex.split(said.split(": ", 1)[1])
    assert again == ["python", "examples/pretrain.py", *argv, "--resume", "auto"]
    torch.rand(7)  # the state of the random numbers is another one by then
    assert pretrain.main(again[2:]) == 0
    assert_same_run(whole, broken)
    assert [line["step"] for line in runs.read_log(broken)] == [4, 8, 9]
    capsys.readouterr()
    assert pretrain.main(again[2:]) == 0
    assert capsys.readouterr().out == f"{broken} is finished\n"


def start(argv: list[str], *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *before, str(ROOT / "tests/examples/tiny_pretrain.py"), *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_was_killed_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = ("--epochs", "12", "--checkpoint-every", "4", "--log-every", "3")
    process = start(arguments(data, killed, *long))
    deadline = time.monotonic() + 60
    while len(runs.checkpoints(killed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 4 < runs.newest_checkpoint(killed)["step"] < 36
    pretrain.main(arguments(data, killed, *long, "--resume", "auto"))
    pretrain.main(arguments(data, whole, *long))
    assert_same_run(whole, killed)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.main(arguments(data, whole, "--checkpoint-every", "2"))
    argv = arguments(data, broken, "--checkpoint-every", "2")
    interrupted_after(5, monkeypatch, argv)
    newest = broken / "checkpoint-00000005.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    assert pretrain.main([*argv, "--resume", "auto"]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {newest} is damaged (")
    assert_same_run(whole, broken)


def test_checkpoints_come_by_the_clock_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(pretrain, "save_checkpoint", lambda directory, step, state: saved.append(step))
    pretrain.main(arguments(data, tmp_path / "a", "--checkpoint-every", "0.0000001min"))
    assert saved == [*range(1, 10)]
    saved.clear()
    pretrain.main(arguments(data, tmp_path / "b", "--checkpoint-every", "60min"))
    assert saved == [9]


def test_a_second_signal_stops_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt.interruptible() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------------- several processes


def test_two_processes_have_the_losses_of_one_on_the_full_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with GroupNorm and nothing random; also the weights at the end."""
    more = ["--norm", "group", "--optimizer", "sgd"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    process = start(["--plain", *arguments(data, tmp_path / "two", *more)], *torchrun)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("wrote ") == 1

    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(pretrain, "views_of", lambda images: plain_view)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    assert pretrain.main(arguments(data, tmp_path / "one", *more)) == 0
    one, two = (runs.read_log(tmp_path / name) for name in ("one", "two"))
    for name in ("losses", "accuracy"):
        found, expected = (torch.tensor([line[name] for line in log]) for log in (two, one))
        torch.testing.assert_close(found, expected)
    found, expected = (torch.load(tmp_path / name / "backbone.pt") for name in ("two", "one"))
    assert found["top.1.0.weight"].dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_processes_of_torchrun_share_each_batch_and_draw_views_of_their_own() -> None:
    whole = Draws(30, 8, steps=6, seed=3)
    parts = [Draws(30, 8, steps=6, seed=3, accumulate=2, process=rank, processes=2) for rank in (0, 1)]
    assert (len(whole), len(parts[0])) == (6, 12)
    for step in range(6):
        micro_batches = [part[2 * step + k] for part in parts for k in (0, 1)]
        assert torch.equal(torch.cat([indices for _, indices in micro_batches]), whole[step][1])
        assert len({seed for seed, _ in micro_batches}) == 4


def test_draws_are_permutations_that_start_anywhere() -> None:
    whole, later = list(Draws(30, 8, steps=6, seed=3)), list(Draws(30, 8, steps=6, seed=3, first=4))
    for epoch in (whole[:3], whole[3:]):
        assert torch.cat([indices for _, indices in epoch]).unique().numel() == 24
    assert not torch.equal(whole[0][1], whole[3][1])
    assert len(later) == 2
    for (seed, indices), (other_seed, other) in zip(whole[4:], later, strict=True):
        assert seed == other_seed
        assert torch.equal(indices, other)
    assert len({seed_of(seed, step, part) for seed in range(5) for step in range(50) for part in range(8)}) == 2000


# ----------------------------------------------------------------------------------------------------------- gradients


def gradients(views: list[list[Tensor]], amp: str = "off", loss: str = "nt-xent") -> dict[str, Tensor]:
    """Of one step whose micro-batches are `views`, unscaled."""
    device = torch.device("cpu")
    args = pretrain_options.parser().parse_args(["--arch", "tiny", "--norm", "group", "--amp", amp, "--decoder", "mlp"])
    args.device, args.overlap, args.accumulate, args.lr, args.weight_decay, args.warm_up = (
        device,
        1,
        len(views),
        0.1,
        0.0,
        0,
    )
    new = training.new_training(args, 12, steps=10)
    new.model.eval()  # without dropout
    for number, pair in enumerate(views):
        training.local_gradients(args, new, None, pair, torch.zeros(4), last=number == len(views) - 1)
    new.scaler.unscale_(new.optimizer)
    return {name: weight.grad for name, weight in new.model.named_parameters() if weight.grad is not None}


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    one, other = (list(torch.randn(2, 4, 3, 12, 12)) for _ in range(2))
    both, first, second = gradients([one, other]), gradients([one]), gradients([other])
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, msg=name)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_in_mixed_precision_come_out_unscaled(amp: str, count: int) -> None:
    views = [list(torch.randn(2, 4, 3, 12, 12)) for _ in range(count)]
    exact, found = gradients(views), gradients(views, amp)
    one, other = (torch.cat([g.flatten() for g in side.values()]) for side in (exact, found))
    assert one.dot(other) / one.norm() / other.norm() > 0.95
    assert 0.95 < other.norm() / one.norm() < 1.05


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_mixed_precision_goes_to_its_end(amp: str, data: Path, tmp_path: Path) -> None:
    assert pretrain.main(arguments(data, tmp_path / "out", "--amp", amp, "--accumulate", "2")) == 0
    assert np.isfinite([line["losses"] for line in runs.read_log(tmp_path / "out")]).all()


def test_compiled_decoders_give_the_same_losses(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that needs no compiler."""
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf"
    )  # of torch's own tracing
    pretrain.main(arguments(data, tmp_path / "plain", "--epochs", "1", "--decoder", "mlp"))
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
    pretrain.main(arguments(data, tmp_path / "compiled", "--epochs", "1", "--decoder", "mlp", "--compile"))
    plain, fast = (
        torch.tensor([line["losses"] for line in runs.read_log(tmp_path / n)]) for n in ("plain", "compiled")
    )
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)
    assert runs.newest_checkpoint(tmp_path / "compiled")["decoders"].keys() == (
        runs.newest_checkpoint(tmp_path / "plain")["decoders"].keys()
    )


# ----------------------------------------------------------------------------------------------- optimiser and schedule


def test_lars_neither_decays_nor_adapts_biases_and_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model[2].requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lars = optimisers.optimizer("lars", model, lr=0.5, weight_decay=0.01)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    lars.step()
    after = dict(model.named_parameters())
    for name in ("0.bias", "1.weight", "1.bias"):
        torch.testing.assert_close(after[name].detach(), before[name] - 0.5)
    w, g = before["0.weight"], torch.ones(4, 3)
    trust = 0.001 * w.norm() / (g.norm() + 0.01 * w.norm())
    torch.testing.assert_close(after["0.weight"].detach(), w - 0.5 * trust * (g + 0.01 * w))
    assert torch.equal(after["2.weight"], before["2.weight"])


def test_lars_adapts_without_weight_decay_too() -> None:
    model = nn.Linear(3, 4, bias=False)
    before = model.weight.detach().clone()
    lars = optimisers.optimizer("lars", model, lr=1.0, weight_decay=0.0)
    model.weight.grad = torch.ones(4, 3)
    lars.step()
    assert (before - model.weight).norm().item() == pytest.approx(0.001 * before.norm().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_other_optimisers_decay_weights_only(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    found = optimisers.optimizer(name, model, lr=0.1, weight_decay=0.2)
    decay = {id(weight): group["weight_decay"] for group in found.param_groups for weight in group["params"]}
    assert [decay[id(weight)] for weight in model.parameters()] == [0.2, 0, 0, 0]


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine(warm_up: int) -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = optimisers.warm_up_and_cosine(sgd, warm_up, steps=12)
    rates = []
    for _ in range(12):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    up = [2 * (step + 1) / (warm_up + 1) for step in range(warm_up)]
    down = [1 + np.cos(np.pi * step / (12 - warm_up)) for step in range(12 - warm_up)]
    assert rates == pytest.approx([*up, *down])


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = optimisers.warm_up_and_cosine(sgd, 3, steps=3)
    rates = []
    for _ in range(3):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 1.5])


# ------------------------------------------------------------------------------------------------------------- collapse


def test_images_that_are_all_alike_collapse_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, labels = np.zeros((8, 12, 12), dtype=np.uint8), np.zeros(8, dtype=np.int64)
    np.savez(tmp_path / "flat.npz", x_train=flat, y_train=labels, x_test=flat, y_test=labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "views_of", lambda images: lambda batch: batch / 127.5 - 1)
        patch.setattr(nn.Dropout, "forward", lambda self, x: x)
        argv = arguments(tmp_path / "flat.npz", tmp_path / "out", "--epochs", "2")
        assert pretrain.main(argv) == 0
    told = re.findall(r"warning: step 1: unit \d: it collapses", capsys.readouterr().err)
    assert len(told) == 2


def test_a_run_that_diverges_stops_in_one_line_and_keeps_the_weights_from_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(
            arguments(data, out, "--optimizer", "sgd", "--lr", "1e38", "--checkpoint-every", "1", "--norm", "group")
        )
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert re.search(r"warning: step \d: unit 0: its loss is not finite", errors)
    assert re.fullmatch(
        r"error: the loss(es)? of units? 0.* not been finite for 5 steps in a row; lower .*", errors.splitlines()[-1]
    )
    kept = runs.newest_checkpoint(out)
    assert kept["step"] <= 2
    assert not (out / "backbone.pt").exists()


# --------------------------------------------------------------------------------------------------------- group norm


def test_group_norm_takes_batch_norms_place_and_name() -> None:
    replaced = norms.by_groups(resnet18())
    reference = resnet18(norm_layer=norms.group_norm)
    reference.load_state_dict(replaced.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(replaced(x), reference(x))
    assert norms.group_norm(244).num_groups == 4


# ------------------------------------------------------------------------------------------------------------ the rest


def test_tensorboard_gets_every_number(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[float]] = {}

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            written[f"{Path(directory).name} from {purge_step}"] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(name, []).append(value)

        def close(self) -> None:
            written["closed"] = []

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    pretrain.main(arguments(data, tmp_path / "out", "--tensorboard", "--epochs", "1"))
    log = runs.read_log(tmp_path / "out")
    assert written["losses/unit 1"] == [line["losses"][1] for line in log]
    assert written["lr"] == [line["lr"] for line in log]
    assert {"tensorboard from 0", "closed"} <= written.keys()


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run ends with."""
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_tensorboard_that_is_not_installed_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = error_of(arguments(data, tmp_path / "out", "--tensorboard"), capsys)
    assert line == "--tensorboard needs the package tensorboard: pip install tensorboard"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--batch-size 31", "--batch-size 31 is larger than the 30 images of noise"),
        (
            "--accumulate 3",
            "--batch-size 8 cannot be shared by 1 processes, each with --accumulate 3: take a multiple of 3.*",
        ),
        ("--accumulate 8", "--batch-size 8 cannot be shared .*: take a multiple of 8 from 16 up, or fewer processes"),
        ("--sync-bn", "--sync-bn is for BatchNorm on GPUs; --norm group needs no synchronising and runs anywhere"),
        ("--overlap 3", "--overlap is between 0 and 2 for 3 stages, got 3"),
        ("--overlap 1 --method gim", "argument --method: not allowed with argument --overlap"),
        ("--method gim --sharing upper", "--sharing upper is a way to share one stage, as loco does.*"),
        ("--decoder tower", "argument --decoder: invalid choice: 'tower' .*"),
        ("--warm-up 4", "--warm-up 4 is longer than the 3 epochs of the run"),
        ("--lr fast", "argument --lr: expected a number from 0, got 'fast'"),
        ("--lr inf", "argument --lr: expected a number from 0, got 'inf'"),
        ("--temperature 0", "argument --temperature: expected a number above 0, got '0'"),
        ("--checkpoint-every 5h", "argument --checkpoint-every: expected steps such as 500 or minutes .* got '5h'"),
        ("--checkpoint-every 0min", "argument --checkpoint-every: expected steps .* got '0min'"),
        ("--device abacus", "argument --device: 'abacus' is no device of this machine"),
        ("--data npz:nowhere.npz", "nowhere.npz cannot be read as an .npz file .*"),
        ("--out file", "cannot read or write .*: .*"),
    ],
)
def test_a_wrong_argument_is_one_line(
    more: str,
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert re.fullmatch(message, error_of(arguments(data, tmp_path / "out", *more.split()), capsys))


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pretrain.main(arguments(data, out, "--epochs", "1"))
    capsys.readouterr()
    line = error_of(arguments(data, out, "--epochs", "1"), capsys)
    assert line == f"{out} holds a run already: go on with it by --resume auto, or choose another --out"
    refused = f"{out} holds a run with other settings: {{}}; take those, or choose another --out"
    line = error_of(arguments(data, out, "--seed", "4", "--epochs", "1", "--resume", "auto"), capsys)
    assert line == refused.format("seed 0, not 4")
    line = error_of(arguments(data, out, "--epochs", "2", "--resume", "auto"), capsys)  # the warm-up follows
    assert line == refused.format("epochs 1, not 2")
    line = error_of(arguments(data, out, "--epochs", "2", "--warm-up", "1", "--resume", "auto"), capsys)
    assert line == refused.format("warm_up 0.1, not 1.0; epochs 1, not 2")
    line = error_of(arguments(data, out, "--epochs", "1", "--method", "gim", "--resume", "auto"), capsys)
    assert line == refused.format("method loco, not gim")


def test_a_checkpoint_of_another_architecture_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = arguments(data, out)
    interrupted_after(2, monkeypatch, argv)
    runs.save_checkpoint(out, 3, {"step": 3, "seconds": 1.0, "backbone": nn.Linear(2, 2).state_dict()})
    capsys.readouterr()
    line = error_of([*argv, "--resume", "auto"], capsys)
    assert line == f"the newest checkpoint of {out} is not one of this run"


def test_more_processes_than_images_of_a_batch_is_one_line_of_each(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    line = error_of(arguments(data, tmp_path / "out"), capsys)
    assert line.startswith("--batch-size 8 cannot be shared by 16 processes")
    monkeypatch.setenv("RANK", "5")
    assert pretrain.main(arguments(data, tmp_path / "out")) == 2
    assert capsys.readouterr().err == f"rank 5: {line}\n"


def test_each_process_has_a_gpu_of_its_own_or_says_that_there_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    second = processes.Processes(rank=5, size=8, local=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second.device(None) == torch.device("cuda", 1)
    assert second.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(pretrain.DataError, match="process 1 of this machine finds 1 GPUs"):
        second.device(None)


def test_the_peak_of_memory_is_in_bytes() -> None:
    assert 1e8 < progress.peak_bytes(torch.device("cpu")) < 1e11  # torch alone takes more than 100 MB
