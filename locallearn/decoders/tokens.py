"""A decoder for token sequences."""

from __future__ import annotations

from einops import reduce
from torch import Tensor, nn

from locallearn.decoders.pooled import check, mlp


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
        self.mlp = mlp(channels, hidden, out_features, depth)

    def forward(self, tokens: Tensor) -> Tensor:
        fits = tokens.ndim == 3 and tokens.shape[2] == self.channels
        check(self, tokens, f"(N, T, {self.channels})", fits)
        tokens = self.norm(self.blocks(tokens))  # (N, T, C)
        result: Tensor = self.mlp(tokens[:, 0] if self.class_token else reduce(tokens, "n t c -> n c", "mean"))
        return result
