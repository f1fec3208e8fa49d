"""Train a backbone of your own locally, keep its plain weights, read them out: `python examples/wrap_your_own.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from inputs.images import load
from inputs.views import grey_views
from reading.evaluate import features, linear_probe
from torch import Tensor, nn

from locallearn import ConvMLPDecoder, LocalWrapper


class Backbone(nn.Module):
    """Any module will do whose stages hand on what their last module returns; nothing in it knows of local learning."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = self.layer(1, 32)
        self.strokes = self.layer(32, 48)
        self.digits = self.layer(48, 64)

    def layer(self, width_in: int, width_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width_in, width_out, 3, padding=1), nn.BatchNorm2d(width_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.strokes(self.edges(x)), 2)
        return self.digits(x).mean(dim=(2, 3))


def main(epochs: int = 20, path: Path = Path("runs/backbone.pt")) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would mostly wait for each other on images of 8x8
    digits, stages = load("digits"), ["edges", "strokes", "digits"]
    model = LocalWrapper(Backbone(), stages, overlap=1, decoder=ConvMLPDecoder, example=torch.zeros(2, 1, 8, 8))
    print(model.plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for images in digits.train[torch.randperm(len(digits.train))].split(128)[:-1]:  # without the incomplete batch
            losses = model.local_step(grey_views(images), grey_views(images))
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: " + "  ".join(f"unit {k} {loss:.2f}" for k, loss in enumerate(losses.tolist())))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.backbone.state_dict(), path)

    backbone = Backbone()  # a fresh one, and nothing of locallearn
    backbone.load_state_dict(torch.load(path))
    known, held_out = features(backbone, digits.train), features(backbone, digits.test)
    accuracy = linear_probe(known, digits.train_labels, held_out, digits.test_labels)
    print(f"linear probe: {accuracy:.1%} of {len(held_out)} held-out digits; weights in {path}")


if __name__ == "__main__":
    main()
