"""timm's families, untrained: the smallest member of each."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.zoo.entry import CLASSES, Entry
from tests.zoo.networks.pictures import pictures
from torch import nn

TIMM: dict[str, tuple[str, int, dict[str, Any], str | int]] = {}  # family: (member, pixels, settings, groups)


def _timm(name: str, settings: dict[str, Any]) -> nn.Module:
    import timm

    import backforward_suite._torchvision  # noqa: F401  (mends the import of torchvision, which timm imports)

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)


def timm() -> list[Entry]:
    """The smallest member of each family, made narrower or shallower by its settings where that is still large."""
    return [
        Entry(
            id=f"timm {family}",
            about=f"{name} at {size} px" + "".join(f", {key}={value}" for key, value in settings.items()),
            build=partial(_timm, name, settings),
            batches=partial(pictures, size),
            optimizers=("gentle",),
            groups=groups,
        )
        for family, (name, size, settings, groups) in TIMM.items()
    ]
