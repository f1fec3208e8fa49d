"""Decoders that enlarge the receptive field by convolutions: LoCo's residual blocks, and DGL's plain ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from locallearn.decoders.pooled import check, mlp


class ConvMLPDecoder(nn.Module):
    """Residual convolution blocks that enlarge the receptive field, global average pooling, then an MLP (Section 4.2).

    The default is the paper's: one bottleneck block with stride 2, pooling, and a 2-layer MLP to 128 dimensions. The paper
    gives no widths; here they are ``c -> c/4 -> c`` and ``c -> c -> 128``.

    Shapes: ``(N, channels, H, W) -> (N, out_features)``; with ``dims=1`` ``(N, channels, L)``, with ``dims=3`` ``(N, channels,
    D, H, W)``.

    Args:
        channels: width of the outlet.
        blocks: how many blocks; with several numbers, as many stages, the first block of each with the stride.
        stride: of each stage's first block: 2, or 1 for none ("w/o ds" in Table 4).
        widths: output width of the blocks, one for all or one per stage; ``channels`` by default.
        bottleneck: width of the blocks' 3x3 convolution; a quarter of their output by default.
        hidden: width of the MLP's hidden layers; that of the last block by default.
        out_features: dimensions of the vectors.
        depth: linear layers of the MLP.
        dims: spatial axes of the outlet: 1, 2 or 3.

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
        dims: int = 2,
    ) -> None:
        super().__init__()
        if dims not in _AXES:
            raise ValueError(f"maps have 1, 2 or 3 spatial axes; got dims={dims}")
        depths = [blocks] if isinstance(blocks, int) else list(blocks)
        wide = [widths or channels] * len(depths) if widths is None or isinstance(widths, int) else list(widths)
        if len(wide) != len(depths):
            raise ValueError(f"widths has one number per stage of blocks; got widths={widths} for blocks={blocks}")
        self.channels, self.dims = channels, dims
        layers: list[nn.Module] = []
        before = channels
        for count, width in zip(depths, wide, strict=True):
            for number in range(count):
                narrow = bottleneck or max(1, width // 4)
                layers.append(_Bottleneck(before, narrow, width, stride if number == 0 else 1, dims))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.mlp = mlp(before, hidden, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        fits = features.ndim == self.dims + 2 and features.shape[1] == self.channels
        check(self, features, f"(N, {self.channels}, {_AXES[self.dims]})", fits)
        maps = self.blocks(features)  # (N, C, H/stride, W/stride)
        result: Tensor = self.mlp(reduce(maps, "n c ... -> n c", "mean"))
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
        self.mlp = mlp(width, hidden, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        fits = features.ndim == 4 and features.shape[1] == self.channels
        check(self, features, f"(N, {self.channels}, H, W)", fits)
        maps = self.convolutions(features)  # (N, width, H/stride, W/stride)
        result: Tensor = self.mlp(reduce(maps, "n c h w -> n c", "mean"))
        return result


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm beside a shortcut (He et al., 2016, Figure 5), after pooling by the stride.

    The stride is an average pooling in front of both branches, not a stride of a convolution: with one operation that reads
    the outlet instead of two, the peak of Greedy InfoMax, which lies here in the lowest unit, falls by two such gradients.
    """

    def __init__(self, before: int, width: int, after: int, stride: int, dims: int) -> None:
        super().__init__()
        self.pool = _pool(stride, dims)
        self.branch = nn.Sequential(
            *_conv(before, width, 1, dims=dims),
            nn.ReLU(inplace=True),
            *_conv(width, width, 3, dims=dims),
            nn.ReLU(inplace=True),
            *_conv(width, after, 1, dims=dims),
        )
        self.shortcut = nn.Identity() if before == after else nn.Sequential(*_conv(before, after, 1, dims=dims))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.pool(maps)
        total: Tensor = self.branch(maps) + self.shortcut(maps)
        return total.relu_()


class _AvgPool3d(nn.Module):
    """Unlike torch's it takes an axis that is shorter than the kernel, such as a single frame."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        kernel = [min(self.stride, size) for size in maps.shape[2:]]
        return F.avg_pool3d(maps, kernel, ceil_mode=True, count_include_pad=False)


def _pool(stride: int, dims: int) -> nn.Module:
    """Average pooling, after which a map of a single position still has one."""
    if stride == 1:
        return nn.Identity()
    if dims == 3:
        return _AvgPool3d(stride)
    return (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](stride, ceil_mode=True, count_include_pad=False)


def _conv(before: int, after: int, kernel: int, stride: int = 1, dims: int = 2) -> tuple[nn.Module, nn.Module]:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return conv(before, after, kernel, stride, padding=kernel // 2, bias=False), norm(after)


_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
