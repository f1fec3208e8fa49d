"""Train one backbone by SimCLR, Greedy InfoMax and LoCo side by side: `python examples/quickstart.py`, one file to copy.

On scikit-learn's digits. All methods get the same initial weights and views; they differ in how far each loss reaches.
"""

import argparse
import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import InterpolationMode, v2

from locallearn import ConvMLPDecoder, LocalWrapper
from locallearn.memory import measure

WIDTHS, STRIDES = (16, 16, 48, 48, 64, 64), (1, 1, 2, 1, 1, 1)  # the stages hold about equally much
STAGES = [f"layer{i + 1}" for i in range(len(WIDTHS))]
LEARNING_RATE, TRAIN = 2e-3, 1287  # the digits from there on are held out
OVERLAPS = {"SimCLR": len(STAGES) - 1, "Greedy InfoMax": 0, "LoCo": 1}
COLUMNS = "linear probe, %", "kNN, %", "peak memory, MB", "GFLOP of a step"
move = v2.RandomAffine(15, (0.12, 0.12), (0.75, 1.15), shear=11, interpolation=InterpolationMode.BILINEAR)
augment = v2.Compose([move, v2.ColorJitter(brightness=0.4, contrast=0.4), v2.GaussianNoise(sigma=0.05)])


class SmallResNet(nn.Sequential):
    """A stem and one of ResNet's basic blocks per stage: `(N, 1, S, S)` -> features `(N, 64)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(1, WIDTHS[0], 3)
        for name, before, width, stride in zip(STAGES, (WIDTHS[0], *WIDTHS), WIDTHS, STRIDES, strict=False):
            self.add_module(name, block := BasicBlock(before, width, stride))
            if stride > 1 or before != width:
                block.downsample = Conv2dNormActivation(before, width, 1, stride, activation_layer=None)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def new_model(overlap: int, seed: int) -> LocalWrapper:
    torch.manual_seed(seed)
    backbone = SmallResNet().to(memory_format=torch.channels_last)  # a third faster on a CPU
    decoders = {width: ConvMLPDecoder(width) for width in dict.fromkeys(WIDTHS)}  # those that all methods start from
    return LocalWrapper(backbone, STAGES, overlap, lambda w: deepcopy(decoders[w]), example=torch.zeros(2, 1, 8, 8))


def train(name: str, model: LocalWrapper, views: list[list[Tensor]], epochs: int) -> list[list[float]]:
    """The mean loss of each unit in each epoch; `views` are those of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4)
    warm_up, steps = max(1, len(views) // 10), len(views) // epochs
    rate = lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / len(views))) / 2)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[Tensor] = []
    for step, pair in enumerate(views, 1):
        optimizer.zero_grad()
        losses.append(model.local_step(*pair))
        optimizer.step()
        scheduler.step()
        if step % steps == 0:
            told = f"\r{name}: epoch {step // steps} of {epochs}, loss of the top unit {losses[-1][-1]:.2f}"
            print(told, end="\n" * (step == len(views)), flush=True)
    return torch.stack(losses).unflatten(0, (epochs, steps)).mean(dim=1).tolist()


@torch.no_grad()
def accuracies(backbone: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """In %, of a linear probe, and of a vote of the 20 nearest by exp(cos / 0.07), on the held-out digits."""
    features = backbone.eval()(images * 2 - 1).numpy()
    vote = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: math.e ** ((1 - distance) / 0.07))
    readers = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), vote
    return [100 * r.fit(features[:TRAIN], labels[:TRAIN]).score(features[TRAIN:], labels[TRAIN:]) for r in readers]


def draw(results: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(12, 7), layout="constrained")
    losses, bars = (part.subplots(1, n, sharey=True) for part, n in zip(figure.subfigures(2, 1), (3, 4), strict=True))
    for k, (panel, (method, curves)) in enumerate(zip(losses, results["losses"].items(), strict=True)):
        for unit, curve in enumerate(zip(*curves, strict=True), 1):
            strength = (1 + unit) / (1 + len(curves[0]))
            panel.plot(range(1, len(curve) + 1), curve, color=f"C{k}", alpha=strength, marker=".")
        panel.axhline(math.log(2 * results["batch_size"] - 1), color="grey", linestyle="--", label="guessing")
        panel.set(xlabel="epoch", title=f"{method}: {len(curves[0])} unit{'s, pale to strong' * (len(curves[0]) > 1)}")
    losses[0].legend(title="InfoNCE", frameon=False)
    for panel, (title, *values) in zip(bars, zip(COLUMNS, *results["table"].values(), strict=True), strict=True):
        bar = panel.barh(list(results["table"]), [value or 0 for value in values], color=["silver", "C0", "C1", "C2"])
        panel.bar_label(bar, ["" if value is None else f"{value:.1f}" for value in values], padding=3)
        panel.set(title=title, xlim=(0, 1.2 * max(value or 0 for value in values)))
    bars[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def free(path: Path) -> Path:
    """`path`, after what was there has become PATH.1, PATH.2, or the next that is free."""
    if path.exists():
        path.rename(next(old for k in range(1, 10**6) if not (old := path.with_name(f"{path.name}.{k}")).exists()))
    return path


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on small images threads mostly wait for each other
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    table, losses = {"random start": [*accuracies(new_model(0, args.seed).backbone, images, labels), None, None]}, {}
    torch.manual_seed(args.seed)
    epochs = [images[torch.randperm(TRAIN).unfold(0, args.batch_size, args.batch_size)] for _ in range(args.epochs)]
    views = [[torch.stack([augment(x) for x in batch]) * 2 - 1 for _ in range(2)] for batch in torch.cat(epochs)]
    for name, overlap in OVERLAPS.items():
        model = new_model(overlap, args.seed)
        losses[name] = train(name, model, views, args.epochs)
        table[name] = accuracies(model.backbone, images, labels)
        cost = measure(partial(model.train().local_step, *views[0]))
        table[name] += [cost.peak_bytes / 1e6, cost.flops / 1e9]
    print(" " * 15 + "".join(f"{title:>16}" for title in COLUMNS))
    for name, row in table.items():
        print(f"{name:15}" + "".join(f"{'' if value is None else format(value, '.1f'):>16}" for value in row))
    results = {**vars(args), "torch": torch.__version__, "table": table, "losses": losses}
    free(args.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    draw(results, free(args.out / "quickstart.png"))
    print(f"{len(labels) - TRAIN} digits are held out: accuracies are good to a point; wrote {args.out}/quickstart.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train one backbone by SimCLR, Greedy InfoMax and LoCo side by side.")
    for name, default in {"epochs": 25, "batch-size": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where results go (%(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 2 <= args.batch_size <= TRAIN:
        parser.exit(2, f"error: --epochs is from 1 up, --batch-size from 2 to {TRAIN}\n")
    try:
        run(args)
    except OSError as problem:
        parser.exit(2, f"error: cannot write to {args.out}: {problem.strerror or problem}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
