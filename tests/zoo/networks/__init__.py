"""Networks from other packages, which are imported when a network is built."""

from tests.zoo.networks.timm_families import timm
from tests.zoo.networks.torchvision_families import torchvision
from tests.zoo.networks.transformers_architectures import transformers

__all__ = ["timm", "torchvision", "transformers"]
