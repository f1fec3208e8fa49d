"""What stands between a stage and its local loss: every row of Table 4 of the LoCo paper, heads of others, one for tokens.

A decoder (elsewhere: projection head) maps the outlet of a unit's last stage to vectors, and is thrown away after training.
``LocalWrapper`` takes any ``Callable[[int], nn.Module]`` of the outlet's width, such as these classes or a
``functools.partial`` of one, or a list of modules, one per unit. With ``P`` for ``functools.partial``, Table 4 is:

==================================  ===========================================================================
extra layers before the MLP         ``decoder=``
==================================  ===========================================================================
none                                ``MLPDecoder``
1 conv block, no downsampling       ``P(ConvMLPDecoder, stride=1)``
1 conv block                        ``ConvMLPDecoder``
2 conv blocks                       ``P(ConvMLPDecoder, blocks=2)``
1 stage                             a list; on ResNet-50's ``layer1``: ``ConvMLPDecoder(256, blocks=4, widths=512)``
full network                        a list; there ``ConvMLPDecoder(256, blocks=(4, 6, 3), widths=(512, 1024, 2048))``
2-layer MLP                         ``P(MLPDecoder, depth=4)``
LoCo + 2-layer MLP                  ``P(ConvMLPDecoder, depth=4)``
==================================  ===========================================================================

Elsewhere heads are named by their convolutions and fully connected layers, such as "1c2f" (InfoPro, Wang et al. 2021). With
C classes, to go with ``loss=cross_entropy``:

==================================  ===========================================================================
head                                ``decoder=``
==================================  ===========================================================================
0c1f, greedy supervised             ``P(MLPDecoder, depth=1, out_features=C)``
0c2f                                ``P(MLPDecoder, hidden=128, out_features=C)``
1c1f, 1c2f, 1c3f                    ``P(PlainConvDecoder, depth=1, out_features=C)``, or ``depth=2`` (DGL), ``depth=3``
2c2f                                ``P(PlainConvDecoder, convolutions=2, out_features=C)``
spatial (CLAPP++)                   ``P(MLPDecoder, grid=2)``
==================================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn


def _mlp(width: int, hidden: int | None, out_features: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers with ReLU in between."""
    if depth < 1:
        raise ValueError(f"an MLP has at least one layer; got depth={depth}")
    sizes = [width, *[hidden or width] * (depth - 1), out_features]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class MLPDecoder(nn.Module):
    """Global average pooling, then an MLP: SimCLR's projection head.

    With ``grid=2`` maps are averaged by quarters instead of as a whole, so that the MLP sees where something is. Local losses
    miss that more than a loss at the top does: without it CLAPP++ falls from 80.5 to 73.2 on CIFAR-10 (2026).

    Shapes: ``(N, channels, ...) -> (N, out_features)``, with any number of spatial axes; with a grid, ``(N, channels, H, W)``.

    Args:
        channels: width of the outlet.
        hidden: width of the MLP's hidden layers; that of the outlet by default.
        out_features: dimensions of the vectors (128 in the paper).
        depth: linear layers of the MLP: 2, or 4 for Table 4's "2-layer MLP" on top.
        grid: cells a side that a map is averaged to; the MLP reads ``grid * grid * channels`` numbers.

    Example:
        >>> import torch
        >>> MLPDecoder(64)(torch.zeros(8, 64, 56, 56)).shape
        torch.Size([8, 128])
        >>> MLPDecoder(64, grid=2).mlp[0]
        Linear(in_features=256, out_features=64, bias=True)
    """

    def __init__(
        self, channels: int, *, hidden: int | None = None, out_features: int = 128, depth: int = 2, grid: int = 1
    ) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"a grid has at least one cell a side; got grid={grid}")
        self.channels = channels
        self.grid = grid
        self.mlp = _mlp(channels * grid**2, hidden or channels, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        if self.grid == 1:
            fits = features.ndim >= 2 and features.shape[1] == self.channels
            _check(self, features, f"(N, {self.channels}, ...)", fits)
            vectors = reduce(features, "n c ... -> n c", "mean")
        else:
            fits = features.ndim == 4 and features.shape[1] == self.channels
            _check(self, features, f"(N, {self.channels}, H, W) with grid={self.grid}", fits)
            vectors = F.adaptive_avg_pool2d(features, self.grid).flatten(1)  # (N, C * grid * grid)
        result: Tensor = self.mlp(vectors)
        return result


class PlainConvDecoder(nn.Module):
    """3x3 convolutions without a shortcut, global average pooling, then an MLP: DGL's heads (Belilovsky et al. 2020).

    ``convolutions=1, depth=2`` is "1c2f", what InfoPro's experiments call DGL. There the heads of ResNet-32's widest layer keep
    its 64 channels and its maps: ``lambda c: PlainConvDecoder(c, width=64, stride=1) if c == 64 else PlainConvDecoder(c)``.

    Shapes: ``(N, channels, H, W) -> (N, out_features)``.

    Args:
        channels: width of the outlet.
        convolutions: how many, each with BatchNorm and ReLU.
        width: their output channels; twice the outlet's by default.
        stride: of the first one.
        hidden: width of the MLP's hidden layers.
        out_features: dimensions of the vectors, or classes.
        depth: linear layers of the MLP.

    Example:
        >>> import torch
        >>> PlainConvDecoder(16, out_features=10)(torch.zeros(8, 16, 32, 32)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        channels: int,
        *,
        convolutions: int = 1,
        width: int | None = None,
        stride: int = 2,
        hidden: int = 128,
        out_features: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if convolutions < 1:
            raise ValueError(f"at least one convolution; got {convolutions}. Without any it is MLPDecoder")
        self.channels = channels
        width = width or 2 * channels
        layers: list[nn.Module] = []
        for number in range(convolutions):
            convolution, norm = _conv(channels if number == 0 else width, width, 3, stride if number == 0 else 1)
            layers += [convolution, norm, nn.ReLU(inplace=True)]
        self.convolutions = nn.Sequential(*layers)
        self.mlp = _mlp(width, hidden, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        fits = features.ndim == 4 and features.shape[1] == self.channels
        _check(self, features, f"(N, {self.channels}, H, W)", fits)
        maps = self.convolutions(features)  # (N, width, H/stride, W/stride)
        result: Tensor = self.mlp(reduce(maps, "n c h w -> n c", "mean"))
        return result


class ConvMLPDecoder(nn.Module):
    """Residual convolution blocks that enlarge the receptive field, global average pooling, then an MLP (Section 4.2).

    The default is the paper's: one bottleneck block with stride 2, pooling, and a 2-layer MLP to 128 dimensions. The paper
    gives no widths; here they are ``c -> c/4 -> c`` and ``c -> c -> 128``.

    Shapes: ``(N, channels, H, W) -> (N, out_features)``.

    Args:
        channels: width of the outlet.
        blocks: how many blocks; with several numbers, as many stages, the first block of each with the stride.
        stride: of each stage's first block: 2, or 1 for none ("w/o ds" in Table 4).
        widths: output width of the blocks, one for all or one per stage; ``channels`` by default.
        bottleneck: width of the blocks' 3x3 convolution; a quarter of their output by default.
        hidden: width of the MLP's hidden layers; that of the last block by default.
        out_features: dimensions of the vectors.
        depth: linear layers of the MLP.

    Example:
        >>> import torch
        >>> ConvMLPDecoder(256)(torch.zeros(8, 256, 14, 14)).shape
        torch.Size([8, 128])
    """

    def __init__(
        self,
        channels: int,
        *,
        blocks: int | Sequence[int] = 1,
        stride: int = 2,
        widths: int | Sequence[int] | None = None,
        bottleneck: int | None = None,
        hidden: int | None = None,
        out_features: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        depths = [blocks] if isinstance(blocks, int) else list(blocks)
        wide = [widths or channels] * len(depths) if widths is None or isinstance(widths, int) else list(widths)
        if len(wide) != len(depths):
            raise ValueError(f"widths has one number per stage of blocks; got widths={widths} for blocks={blocks}")
        self.channels = channels
        layers: list[nn.Module] = []
        before = channels
        for count, width in zip(depths, wide, strict=True):
            for number in range(count):
                layers.append(
                    _Bottleneck(before, bottleneck or max(1, width // 4), width, stride if number == 0 else 1)
                )
                before = width
        self.blocks = nn.Sequential(*layers)
        self.mlp = _mlp(before, hidden, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        fits = features.ndim == 4 and features.shape[1] == self.channels
        _check(self, features, f"(N, {self.channels}, H, W)", fits)
        maps = self.blocks(features)  # (N, C, H/stride, W/stride)
        result: Tensor = self.mlp(reduce(maps, "n c h w -> n c", "mean"))
        return result


class TokenDecoder(nn.Module):
    """For token sequences, such as a ViT's: transformer blocks, normalisation, pooling over the tokens, then an MLP.

    A block stands where :class:`ConvMLPDecoder` has a convolution block; the paper has no transformer.

    Shapes: ``(N, T, channels) -> (N, out_features)``.

    Args:
        channels: width of the tokens.
        blocks: pre-norm transformer blocks (self-attention, MLP of the tokens' width) before pooling.
        heads: attention heads; one per 64 channels by default, if that divides the width, else one.
        class_token: read the first token instead of the mean of all.
        hidden: width of the MLP's hidden layers; that of the tokens by default.
        out_features: dimensions of the vectors.
        depth: linear layers of the MLP.

    Example:
        >>> import torch
        >>> TokenDecoder(192)(torch.zeros(8, 197, 192)).shape
        torch.Size([8, 128])
    """

    def __init__(
        self,
        channels: int,
        *,
        blocks: int = 1,
        heads: int | None = None,
        class_token: bool = False,
        hidden: int | None = None,
        out_features: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__()
        heads = heads or (channels // 64 if channels % 64 == 0 else 1)
        self.channels = channels
        self.class_token = class_token
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(
                    channels, heads, dim_feedforward=channels, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            ]
        )
        self.norm = nn.LayerNorm(channels)
        self.mlp = _mlp(channels, hidden, out_features, depth)

    def forward(self, tokens: Tensor) -> Tensor:
        fits = tokens.ndim == 3 and tokens.shape[2] == self.channels
        _check(self, tokens, f"(N, T, {self.channels})", fits)
        tokens = self.norm(self.blocks(tokens))  # (N, T, C)
        result: Tensor = self.mlp(tokens[:, 0] if self.class_token else reduce(tokens, "n t c -> n c", "mean"))
        return result


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm beside a shortcut (He et al., 2016, Figure 5), after pooling by the stride.

    The stride is an average pooling in front of both branches, not a stride of a convolution: with one operation that reads
    the outlet instead of two, the peak of Greedy InfoMax, which lies here in the lowest unit, falls by two such gradients.
    """

    def __init__(self, before: int, width: int, after: int, stride: int) -> None:
        super().__init__()
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)  # a 1x1 map stays one
        self.pool = nn.Identity() if stride == 1 else pool
        self.branch = nn.Sequential(
            *_conv(before, width, 1),
            nn.ReLU(inplace=True),
            *_conv(width, width, 3),
            nn.ReLU(inplace=True),
            *_conv(width, after, 1),
        )
        self.shortcut = nn.Identity() if before == after else nn.Sequential(*_conv(before, after, 1))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.pool(maps)
        total: Tensor = self.branch(maps) + self.shortcut(maps)
        return total.relu_()


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(after)


def _check(decoder: nn.Module, features: Tensor, expected: str, fits: bool) -> None:
    if not fits:
        raise ValueError(
            f"{type(decoder).__name__} reads {expected}; got {tuple(features.shape)}. MLPDecoder is for vectors and feature "
            "maps, ConvMLPDecoder for feature maps, TokenDecoder for token sequences; LocalWrapper's channel_axis= says which "
            "axis of an outlet holds the channels"
        )
