"""What stands between a stage and its local loss: every row of Table 4 of the LoCo paper, heads of others, one for tokens.

A :term:`decoder` (elsewhere: projection head) maps the :term:`outlet` of a :term:`unit`'s last stage to vectors, and is thrown
away after training.
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

from locallearn.decoders.convolutions import ConvMLPDecoder, PlainConvDecoder
from locallearn.decoders.pooled import MLPDecoder
from locallearn.decoders.tokens import TokenDecoder

__all__ = ["ConvMLPDecoder", "MLPDecoder", "PlainConvDecoder", "TokenDecoder"]
