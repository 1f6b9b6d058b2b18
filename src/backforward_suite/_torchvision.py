"""Make ``import torchvision`` work with a CPU-only torch: import this module first.

Some package indexes have only CUDA builds of torchvision. With a CPU build of torch their operators do not load, and
torchvision fails with ``operator torchvision::nms does not exist`` when it registers shape functions for them (and so
does Lightning, through torchmetrics). Data sets, transforms and ``make_grid`` need none of them, so declaring the two
operators that torchvision names is enough. Calling one of them is still an error: they have no implementation.
"""

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_torchvision() -> None:
    """Import torchvision; if its operators are missing with a CPU-only torch, declare them and import again.

    Raises:
        ImportError, RuntimeError: Any other failure to import it.
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
        # Python would reuse the unfinished modules of the failed import.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


import_torchvision()
