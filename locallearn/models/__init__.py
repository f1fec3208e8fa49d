"""The paper's backbones that torchvision lacks, and small-image versions. Not imported by ``import locallearn``.

====================================  ===========================================  =================================
backbone                              ``stages=``                                  source
====================================  ===========================================  =================================
:func:`presnet50`                     ``layer1`` ... ``layer6``                    Table 8
:func:`presnet_small`                 ``layer1`` ... ``layer6``                    ours, for 16 to 96 pixels
:func:`shufflenet_v2_50`              ``stage2``, ``stage3``, ``stage4``,          Ma et al. 2018, Table 8
                                      ``conv6``
``torchvision.models.resnet50``       ``layer1`` ... ``layer4``                    He et al. 2016
:func:`resnet_cifar`                  :func:`resnet_cifar_stages`                  He et al. 2016, Section 4.2
====================================  ===========================================  =================================

:func:`presnet_small` and :func:`resnet_cifar` are for small images, the others for 224 pixels; :func:`small_image_stem` refits
those for images of 32.
"""

from locallearn.models.presnet import PResNet, presnet50, presnet_small
from locallearn.models.resnet_cifar import ResNetCifar, resnet_cifar, resnet_cifar_stages
from locallearn.models.shufflenet import ShuffleNetV2Large, shufflenet_v2_50
from locallearn.models.stem import small_image_stem

__all__ = [
    "PResNet",
    "ResNetCifar",
    "ShuffleNetV2Large",
    "presnet50",
    "presnet_small",
    "resnet_cifar",
    "resnet_cifar_stages",
    "shufflenet_v2_50",
    "small_image_stem",
]
