"""Make ``import torchvision`` work beside a CPU-only torch: import this module first.

Package indexes may serve CUDA builds of torchvision alone. Beside a CPU build of torch their operators do not load,
and torchvision then stops with ``operator torchvision::nms does not exist`` while it registers shape functions for
operators that are not there (and Lightning stops with it, through torchmetrics). Data sets, transforms, ``make_grid``
need none of them: declaring the two that torchvision asks for by name is enough. Whoever calls one of them still gets
an error, for they have no implementation.
"""

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_torchvision() -> None:
    """Import torchvision; where its operators do not fit a CPU-only torch, declare them and import again.

    Any other failure to import is passed on untouched.
    """
    global _library  # noqa: PLW0603
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if str(error) != _MISSING or torch.version.cuda is not None or torch.version.hip is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        # What the failed import left behind would be taken for the finished modules.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


import_torchvision()
