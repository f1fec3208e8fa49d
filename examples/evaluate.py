"""How good are frozen features? A linear probe and a nearest-neighbour vote, on held-out images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from views import scaled


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """The backbone's outputs in eval mode for uint8 images `(N, C, S, S)`: `(N, D)`, on the CPU."""
    device = next(backbone.parameters()).device
    training = backbone.training
    backbone.eval()
    outputs = [backbone(scaled(batch.to(device))).flatten(1).cpu() for batch in images.split(batch_size)]
    backbone.train(training)
    return torch.cat(outputs)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy in 0..1 of a logistic regression on standardised features `(N, D)`."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), test_labels.numpy()))


def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Test accuracy in 0..1 of a vote of the k training features nearest in angle, each with weight exp(cos / t).

    Wu et al. 2018, section 3.4.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(train_labels.max()) + 1
    right = 0
    for batch, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        nearness, neighbours = (batch @ train.T).topk(min(k, len(train)), dim=1)  # (B, k)
        votes = torch.zeros(len(batch), classes)
        votes.scatter_add_(1, train_labels[neighbours], (nearness / temperature).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test)
