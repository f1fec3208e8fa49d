"""The decoder that fits an outlet by its shape: what ``decoder="auto"`` means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from locallearn.decoders.convolutions import ConvMLPDecoder
from locallearn.decoders.pooled import MLPDecoder
from locallearn.decoders.tokens import TokenDecoder


def fitting(shape: Sequence[int], channel_axis: int) -> nn.Module:
    """Makes the decoder for outlets of that shape.

    ===========================================  ==========================================
    outlet                                       decoder
    ===========================================  ==========================================
    ``(N, C)``                                   ``MLPDecoder``
    ``(N, T, C)``, channels last: tokens         ``TokenDecoder``
    ``(N, C, L)``                                ``ConvMLPDecoder`` of one dimension
    ``(N, C, H, W)``, ``(N, H, W, C)``           ``ConvMLPDecoder``
    ``(N, C, D, H, W)``, ``(N, D, H, W, C)``     ``ConvMLPDecoder`` of three dimensions
    more axes                                    ``MLPDecoder``
    ===========================================  ==========================================

    Args:
        shape: of the outlet.
        channel_axis: 1, or -1 for channels last, which reach a decoder of maps with channels first.

    Example:
        >>> type(fitting((8, 197, 192), -1)).__name__, type(fitting((8, 64, 28, 28), 1)).__name__
        ('TokenDecoder', 'ConvMLPDecoder')
    """
    channels, dims = shape[channel_axis], len(shape) - 2
    if dims == 1 and channel_axis == -1:
        return TokenDecoder(channels)
    return ConvMLPDecoder(channels, dims=dims) if dims in (1, 2, 3) else MLPDecoder(channels)
