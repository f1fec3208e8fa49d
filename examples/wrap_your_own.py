"""Train a backbone of your own locally, keep its plain weights, read them out: `python examples/wrap_your_own.py`."""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

from locallearn import ConvMLPDecoder, LocalWrapper

augment = v2.Compose([v2.RandomAffine(15, (0.12, 0.12), (0.75, 1.15)), v2.ColorJitter(0.4, 0.4), v2.GaussianNoise()])


class Backbone(nn.Module):
    """Any module will do whose stages hand on what their last module returns; nothing in it knows of local learning."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = Conv2dNormActivation(1, 32)
        self.strokes = Conv2dNormActivation(32, 48)
        self.digits = Conv2dNormActivation(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.strokes(self.edges(x)), 2)
        return self.digits(x).mean(dim=(2, 3))


def view(images: Tensor) -> Tensor:
    return torch.stack([augment(image) for image in images])


def check_writable(path: Path) -> None:
    """Tell now, rather than after the training, that a file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def main(epochs: int = 20, path: Path = Path("runs/backbone.pt")) -> None:
    check_writable(path)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would mostly wait for each other on images of 8x8
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    train, test = images[:1287], images[1287:]  # those held out are by people who wrote none of the others

    stages = ["edges", "strokes", "digits"]
    model = LocalWrapper(Backbone(), stages, overlap=1, decoder=ConvMLPDecoder, example=torch.zeros(2, 1, 8, 8))
    print(model.plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(128)[:-1]:  # without the incomplete one
            losses = model.local_step(view(batch), view(batch))
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: " + "  ".join(f"unit {k} {loss:.2f}" for k, loss in enumerate(losses.tolist())))
    torch.save(model.backbone.state_dict(), path)

    backbone = Backbone()  # a fresh one, and nothing of locallearn
    backbone.load_state_dict(torch.load(path))
    with torch.no_grad():
        known, held_out = (backbone.eval()(part).numpy() for part in (train, test))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, labels[:1287])
    print(f"linear probe: {probe.score(held_out, labels[1287:]):.1%} of {len(test)} held-out digits; weights in {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Train a backbone of your own locally, and read out its plain weights."
    )
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--out", type=Path, default=Path("runs/backbone.pt"), help="the weights' file (%(default)s)")
    args = parser.parse_args()
    try:
        main(args.epochs, args.out)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    except OSError as problem:
        parser.exit(2, f"error: cannot write {args.out}: {problem.strerror or problem}\n")
