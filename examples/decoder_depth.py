r"""Table 4, how deep a local loss's decoder is to be: its rows as runs over seeds, `python examples/decoder_depth.py`.

The paper's are of ResNet-50 on ImageNet, 100 epochs:

    python examples/decoder_depth.py --data imagenet --data-dir data/imagenet --arch resnet50 --epochs 100 \
        --batch-size 4096 --seeds 1 --protocol paper

There the convolution block gives Greedy InfoMax 4.2 points, and sharing (LoCo) another 1.1. Without arguments: a small
network on scikit-learn's digits, which are easy and few; read the spread before the order. Differs from the paper in the
decoders' widths, which it does not give.
"""

from __future__ import annotations

import sys
from functools import partial

import stoppable

import ablation
from ablation import Ablation, Row

TABLE_4 = Ablation(
    "Table 4, decoder depth",
    (
        Row("no block", "simclr", "mlp", "hard", 65.7),
        Row("no block", "gim", "mlp", "hard", 60.9),
        Row("1 conv block", "simclr", "conv", "hard", 65.6),
        Row("1 conv block, no downsampling", "gim", "conv-no-downsampling", "hard", 63.6),
        Row("1 conv block", "gim", "conv", "hard", 65.1),
        Row("2 conv blocks", "gim", "conv2", "hard", 65.8),
        Row("1 stage", "gim", "stage", "hard", 65.8),
        Row("full network", "gim", "network", "hard", 65.8),
        Row("2-layer MLP", "simclr", "mlp4", "hard", 67.1),
        Row("2-layer MLP", "gim", "mlp4", "hard", 62.3),
        Row("1 conv block", "loco", "conv", "hard", 66.2),
        Row("1 conv block + 2-layer MLP", "loco", "conv+mlp4", "hard", 67.5),
    ),
)
main = partial(ablation.main, TABLE_4, "decoder_depth")

if __name__ == "__main__":
    sys.exit(main())
