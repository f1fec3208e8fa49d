"""LoCo on several processes, two stages each: `torchrun --nproc-per-node 2 examples/pipeline.py`.

Each process holds its own stages and their optimizer state, and nothing of the others'. All run at once: a stage begins the
next batch when the units above it have been trained on this one, so that there are no micro-batches and nothing to flush.
The weights are those of one process, to the bit: with `--nproc-per-node 1` and `--stages 4` come the same ones.

By default on scikit-learn's 1,797 handwritten digits, which come with it. Every `--every` steps all ranks write a checkpoint;
started again with the same `--folder`, they go on from the last one, and so does `torchrun --max-restarts 3` by itself when a
process dies. In the end rank 0 alone loads that checkpoint into the whole model, and tells the accuracy of the nearest
neighbour: a pipeline's checkpoint fits one process, and any other number of them.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from locallearn import ConvMLPDecoder, LocalWrapper
from locallearn.pipeline import Pipeline


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        self.main = nn.Sequential(
            convolutions[0], nn.BatchNorm2d(width), nn.ReLU(), convolutions[1], nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.main(x)).relu()


def build(stages: int, width: int, seed: int) -> LocalWrapper:
    """The whole model, alike on every rank; a stage is two blocks, the first one with the stem."""
    torch.manual_seed(seed)
    parts = [nn.Sequential(Block(width), Block(width)) for _ in range(stages)]
    parts[0].insert(0, nn.Conv2d(1, width, 3, padding=1))
    decoder = lambda channels: ConvMLPDecoder(channels, out_features=64)  # noqa: E731
    return LocalWrapper(nn.Sequential(*parts), list(range(stages)), decoder=decoder, example=torch.rand(2, 1, 8, 8))


def two_views(images: Tensor, batch: int, step: int, seed: int) -> list[Tensor]:
    """A batch that depends on step and seed alone: each view moved by up to a pixel, with noise."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + step)
    chosen = images[torch.randperm(len(images), generator=generator)[:batch]]
    views = []
    for _ in range(2):
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        moved = chosen.roll((down, right), (2, 3))
        views.append(moved + 0.1 * torch.randn(moved.shape, generator=generator))
    return views


def nearest_neighbour(model: LocalWrapper, images: Tensor, labels: Tensor, known: int) -> float:
    """The accuracy on the images after the first ``known``, each given the label of the nearest one among those."""
    model.eval()
    with torch.no_grad():
        features = nn.functional.normalize(model.backbone(images).mean((2, 3)))
    nearest = (features[known:] @ features[:known].T).argmax(1)
    return float((labels[:known][nearest] == labels[known:]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", type=int, default=2, help="per process (default 2)")
    parser.add_argument("--width", type=int, default=32, help="channels (default 32)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--mode", choices=["exact", "eager"], default="exact", help="eager waits for no gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default 50)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/pipeline"), help="checkpoints, to go on from the last"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for another one")
    args = parser.parse_args()

    if "LOCAL_WORLD_SIZE" not in os.environ:
        parser.exit(2, "error: torchrun starts it: torchrun --nproc-per-node 2 examples/pipeline.py\n")
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels, known = torch.tensor(digits.target), 1500

    model = build(args.stages * ranks, args.width, args.seed).to(device)
    pipe = Pipeline(
        model,
        [args.stages] * ranks,
        lambda weights: torch.optim.AdamW(weights, lr=1e-3),
        example=torch.rand(2, 1, 8, 8, device=device),
        mode=args.mode,
        timeout=timedelta(seconds=args.timeout),
    )

    latest, done = args.folder / "latest", 0
    if latest.exists():
        done = int(latest.read_text())
        state = pipe.state_dict()
        dcp.load(state, checkpoint_id=args.folder / f"step-{done}")
        pipe.load_state_dict(state)

    progress = tqdm(range(done, args.steps), initial=done, total=args.steps, disable=rank > 0)
    for step in progress:
        views = (
            [view.to(device) for view in two_views(images[:known], args.batch, step, args.seed)] if rank == 0 else []
        )
        losses = pipe.step(*views)
        if step % 10 == 9:
            progress.set_postfix(
                {f"loss of unit {k}": f"{loss:.3f}" for k, loss in zip(pipe.units, losses, strict=True)}
            )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            pipe.flush()
            dcp.save(pipe.state_dict(), checkpoint_id=args.folder / f"step-{step + 1}")
            if rank == 0:
                (args.folder / "new").write_text(str(step + 1))
                (args.folder / "new").replace(latest)  # whole, or not at all

    dist.destroy_process_group()
    if rank == 0:
        whole = build(args.stages * ranks, args.width, args.seed)
        state = {"model": whole.state_dict()}
        dcp.load(state, checkpoint_id=args.folder / f"step-{args.steps}")
        whole.load_state_dict(state["model"])
        print(f"nearest neighbour: {nearest_neighbour(whole, images, labels, known):.1%}")


if __name__ == "__main__":
    main()
