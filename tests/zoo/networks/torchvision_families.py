"""torchvision's image classifiers, untrained: the smallest member of each family."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from tests.zoo.entry import CLASSES, Entry
from tests.zoo.networks.pictures import pictures
from torch import Tensor, nn

TORCHVISION: dict[str, tuple[str, int, dict[str, Any], str | int]] = {  # family: (member, pixels, settings, groups)
    "alexnet": ("alexnet", 64, {}, "layer"),
    "convnext": ("ConvNeXt", 32, {"stochastic_depth_prob": 0.2}, "layer"),
    "densenet": ("DenseNet", 32, {"growth_rate": 8, "block_config": (2, 2, 2), "num_init_features": 8}, "layer"),
    "efficientnet": ("efficientnet_b0", 32, {}, 8),
    "efficientnet_v2": ("efficientnet_v2_s", 32, {}, 8),
    "googlenet": ("googlenet", 64, {"init_weights": True, "aux_logits": False}, 8),
    "googlenet with auxiliary heads": ("googlenet", 64, {"init_weights": True}, 8),
    "inception_v3": ("inception_v3", 75, {"init_weights": True, "aux_logits": False}, 8),
    "maxvit": (
        "MaxVit",
        64,
        {"input_size": (64, 64), "stem_channels": 8, "partition_size": 2, "block_channels": [8, 16],
         "block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.2},
        "layer",
    ),
    "mnasnet": ("mnasnet0_5", 64, {}, "layer"),
    "mobilenet_v2": ("mobilenet_v2", 64, {}, 8),
    "mobilenet_v3": ("mobilenet_v3_small", 64, {}, "layer"),
    "regnet_x": ("regnet_x_400mf", 64, {}, 8),
    "regnet_y": ("regnet_y_400mf", 64, {}, 8),
    "resnet": ("resnet18", 64, {}, "layer"),
    "resnext": ("ResNet", 64, {"layers": [1, 1, 1, 1], "groups": 32, "width_per_group": 4}, "layer"),
    "shufflenet_v2": ("shufflenet_v2_x0_5", 64, {}, "layer"),
    "squeezenet": ("squeezenet1_1", 64, {}, "layer"),
    "swin": ("SwinTransformer", 32, {}, "layer"),
    "swin_v2": ("SwinTransformer", 32, {"v2": True}, "layer"),
    "vgg": ("vgg11", 32, {}, 4),
    "vgg with BatchNorm": ("vgg11_bn", 32, {}, 4),
    "vit": (
        "VisionTransformer",
        32,
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24},
        "layer",
    ),
    "wide_resnet": ("ResNet", 64, {"layers": [1, 1, 1, 1], "width_per_group": 128}, "layer"),
}  # fmt: skip


def _torchvision(name: str, settings: dict[str, Any]) -> nn.Module:
    """Build a member by its name (lower case), or a smaller one by its class."""
    from torchvision import models
    from torchvision.models import convnext, resnet, swin_transformer

    import backforward_suite._torchvision  # noqa: F401  (fixes its import with a CPU torch)

    settings = settings | {"num_classes": CLASSES}
    if name == "ConvNeXt":
        blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
        return models.ConvNeXt(blocks, **settings)
    if name == "ResNet":
        return models.ResNet(resnet.Bottleneck, **settings)
    if name == "SwinTransformer":
        if settings.pop("v2", False):
            settings["block"] = swin_transformer.SwinTransformerBlockV2
            settings["downsample_layer"] = swin_transformer.PatchMergingV2
        return models.SwinTransformer([2, 2], 8, [1, 2], [1, 2], [2, 2], stochastic_depth_prob=0.2, **settings)
    if name[0].isupper():
        return getattr(models, name)(**settings)
    return models.get_model(name, weights=None, **settings)


def _with_auxiliary(output: Any, y: Tensor) -> Tensor:
    heads = (output.logits, output.aux_logits1, output.aux_logits2)
    return sum((F.cross_entropy(head, y) for head in heads[1:]), start=F.cross_entropy(heads[0], y))


def torchvision() -> list[Entry]:
    """Return one member of each family of image classifiers."""
    return [
        Entry(
            id=f"torchvision {family}",
            about=f"{name} at {size} px",
            build=partial(_torchvision, name, settings),
            batches=partial(pictures, size),
            loss_of=lambda model, auxiliary="auxiliary" in family: _with_auxiliary if auxiliary else F.cross_entropy,
            optimizers=("gentle",),
            groups=groups,
        )
        for family, (name, size, settings, groups) in TORCHVISION.items()
    ]
