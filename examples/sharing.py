r"""Table 5, how units are to share a stage: its rows as runs over seeds, `python examples/sharing.py`.

The paper's are of ResNet-50 on ImageNet, 100 epochs:

    python examples/sharing.py --data imagenet --data-dir data/imagenet --arch resnet50 --epochs 100 --batch-size 4096 \
        --seeds 1 --protocol paper

Every row has the same decoder, one convolution block and a 4-layer MLP, so "none" is Greedy InfoMax with LoCo's decoder.
Without arguments: a small network of three blocks per stage on scikit-learn's digits, which are easy and few; read the
spread before the order.
"""

from __future__ import annotations

import sys
from functools import partial

import stoppable

import ablation
from ablation import Ablation, Row

TABLE_5 = Ablation(
    "Table 5, sharing",
    (
        Row("none", "loco", "conv+mlp4", "none", 65.1),
        Row("the upper layer's gradient only", "loco", "conv+mlp4", "upper", 65.3),
        Row("L2 penalty of 1e-4", "loco", "conv+mlp4", "soft-1e-4", 65.5),
        Row("L2 penalty of 1e-3", "loco", "conv+mlp4", "soft-1e-3", 66.0),
        Row("L2 penalty of 1e-2", "loco", "conv+mlp4", "soft-1e-2", 65.9),
        Row("first block of each stage", "loco", "conv+mlp4", "first-block", 64.8),
        Row("first 2 blocks", "loco", "conv+mlp4", "first-2-blocks", 65.3),
        Row("the whole stage (LoCo)", "loco", "conv+mlp4", "hard", 66.2),
    ),
    {"--arch": "presnet_small-3"},  # the first blocks of a stage are fewer than all only where there are three
)
main = partial(ablation.main, TABLE_5, "sharing")

if __name__ == "__main__":
    sys.exit(main())
