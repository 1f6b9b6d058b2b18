"""What the tape knows about torch's functions.

Only `ESCAPES` and `GRAPHS` must be complete: they name every way to a tensor's memory and to its graph. A name missing
from another list costs time but never exactness.
"""

from __future__ import annotations

from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALL, SHAPE, PLAIN, ESCAPE, GRAPH = range(5)
# Calls that expose a tensor's memory, which may then change unseen; and calls that read the graph behind a tensor.
ESCAPES = {
    *("numpy", "__array__", "__array_wrap__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "set_"),
    *("__dlpack__", "__cuda_array_interface__", "share_memory_", "resize_", "apply_", "map_", "map2_"),
}
GRAPHS = {"grad", "backward", "grad_fn", "is_leaf", "retain_grad", "requires_grad_", "_grad", "_grad_fn"}
# With channels last on a CPU, torch's backward of these crashes the process unless the input's gradient is taken too.
GROUP_NORMS = frozenset({F.group_norm, torch.group_norm, torch.native_group_norm})

# Calls known to draw nothing. In networks that draw, the tape checks the generators around all others.
QUIET = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.layer_norm, F.group_norm, F.relu, F.gelu, F.silu),
        *(F.softmax, F.log_softmax, F.cross_entropy, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.embedding),
        *(torch.relu, torch.tanh, torch.sigmoid, torch.cat, torch.stack, torch.flatten, torch.matmul, torch.bmm),
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.matmul, Tensor.view, Tensor.reshape),
        *(Tensor.transpose, Tensor.permute, Tensor.contiguous, Tensor.flatten, Tensor.mean, Tensor.sum, Tensor.detach),
        *(Tensor.add_, Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.unsqueeze, Tensor.squeeze, Tensor.expand),
    }
)


# Calls known to change only arguments whose version increases. Any other call may have changed a buffer.
READERS = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.embedding, F.layer_norm, torch.matmul, torch.where, torch.cat, torch.lerp),
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.pow, Tensor.exp, Tensor.sqrt, Tensor.to, Tensor.float),
        *(Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__, Tensor.__radd__, Tensor.__rmul__),
        *(Tensor.__rsub__, Tensor.__rtruediv__, Tensor.__getitem__, Tensor.__eq__, Tensor.__ne__, Tensor.__lt__),
        *(Tensor.view, Tensor.reshape, Tensor.expand, Tensor.masked_fill, Tensor.unsqueeze, Tensor.clone, Tensor.mean),
        *(Tensor.detach, Tensor.sum, Tensor.matmul, Tensor.add_, Tensor.mul_, Tensor.copy_, Tensor.lerp_, Tensor.sub_),
    }
)

VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}
# Calls that read no values; and in-place calls that change what these return.
SHAPES = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "__len__"),
    *("shape", "ndim", "dtype", "device", "is_contiguous", "element_size", "get_device", "storage_offset"),
}
RESHAPES = {
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "resize_as_", "rename_"),
}
# Calls that return no tensor: they run in every pass.
NO_TENSOR = {
    *("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "equal", "allclose"),
    *("register_hook", "__repr__", "__format__", "__hash__", "is_tensor", "is_storage", "is_nonzero", "type"),
    *("has_names", "is_same_size", "result_type", "can_cast"),
}


def kind_of(func: Any, name: Any) -> int:
    """Return whether a call makes values, reads a shape, reads values, exposes memory, or reads the graph."""
    label = getattr(name, "__name__", "")
    if label in SHAPES:
        return SHAPE
    if label in ESCAPES:
        return ESCAPE
    if label in GRAPHS and label != "requires_grad_":
        return GRAPH
    if type(func) is MethodWrapperType:
        return CALL if func.__name__ == "__set__" or label in VIEWS else PLAIN
    return PLAIN if label in NO_TENSOR else CALL


# Types of arguments that are the same if they compare equal.
ATOMS = frozenset(
    {int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
    | {type(Ellipsis), torch.Size}
)
TENSORS = frozenset({Tensor, nn.Parameter})


def can_keep() -> bool:
    """Return False inside a transform (vmap, grad) or under hooks on saved tensors (checkpointing)."""
    return not _in_transform() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """Return a tensor's version; -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def outs(value: Any) -> list[Tensor] | None:
    """Return the tensors in a result, in order; None if it contains another type."""
    if value is None:
        return []
    kind = type(value)
    if kind in TENSORS:
        return [value]
    if isinstance(value, tuple | list):
        found: list[Tensor] = []
        for item in value:
            inner = outs(item)
            if inner is None:
                return None
            found += inner
        return found
    return [] if kind in ATOMS else None


def with_gradient(args: Any, tensors: list[Tensor], besides: list[Tensor]) -> Any:
    """Append a group norm's input to `besides`, whose gradients the engine also takes; return the call's arguments."""
    if not args or _in_transform() or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return args
    besides.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
    return besides[-1], *args[1:]
