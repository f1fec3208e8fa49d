"""How good are frozen features? A linear probe and a nearest-neighbour vote, on held-out images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from backbones import StageFeatures
from torch import Tensor, nn
from tqdm import tqdm

from locallearn.diagnosis.measures import vote


def stage_vectors(
    backbone: nn.Module, stages: tuple[str, ...], batches: Iterable[tuple[Tensor, Tensor]], count: int
) -> tuple[list[Tensor], Tensor]:
    """Each stage's outlet, averaged over its positions, in eval mode: `[(N, C_k), ...]`, and labels `(N,)`, on the CPU.

    `batches` are images as the backbone takes them and their labels, `count` images in all.
    """
    training, vectors, labels = backbone.training, [[] for _ in stages], []
    features = StageFeatures(backbone, stages)
    backbone.eval()
    with tqdm(total=count, unit="image", desc="features", leave=False, dynamic_ncols=True, delay=1) as progress:
        for images, batch_labels in batches:
            for seen, outlet in zip(vectors, features(images), strict=True):
                seen.append(outlet.float().cpu())
            labels.append(batch_labels.cpu())
            progress.update(len(images))
    backbone.train(training)
    return [torch.cat(seen) for seen in vectors], torch.cat(labels)


def logistic_regression(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy in 0..1 of scikit-learn's logistic regression, on the features' own device: by torch's L-BFGS.

    Mean cross-entropy + |w|^2 / 2N on standardised features, which is scikit-learn's C = 1.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    train, test = ((part - mean) / torch.where(std > 0, std, 1) for part in (train, test))
    probe = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device, dtype=train.dtype)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=2000, max_eval=4000, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train), train_labels) + probe.weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float((probe(test).argmax(dim=1) == test_labels).float().mean())


def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Test accuracy in 0..1 of a vote of the k training features nearest in angle, each with weight exp(cos / t).

    Wu et al. 2018, section 3.4.
    """
    right = 0
    for batch, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        right += int((vote(batch, train, train_labels, k, temperature) == labels).sum())
    return right / len(test)
