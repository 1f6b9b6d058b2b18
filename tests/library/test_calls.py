from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backforward.calls import CALL, ESCAPE, GRAPH, PLAIN, QUIET, READERS, SHAPE, kind_of


class Seen(TorchFunctionMode):
    """Notes the kind of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__self__ if type(func).__name__ == "method-wrapper" else func
        self.kinds.append(kind_of(func, name))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda x: x + 1, CALL),
        (lambda x: x.T, CALL),
        (lambda x: x.shape, SHAPE),
        (lambda x: x.size(), SHAPE),
        (lambda x: x.requires_grad, PLAIN),
        (lambda x: x.sum().item(), [CALL, PLAIN]),
        (lambda x: x.numpy(), ESCAPE),
        (lambda x: x.data_ptr(), ESCAPE),
        (lambda x: x.grad_fn, GRAPH),
        (lambda x: x.requires_grad_(), CALL),
    ],
    ids=["add", "T", "shape", "size", "requires_grad", "item", "numpy", "data_ptr", "grad_fn", "requires_grad_"],
)
def test_kinds(call: Any, kind: int | list[int]) -> None:
    x = torch.ones(2, 2)
    with Seen() as seen:
        call(x)
    assert seen.kinds == (kind if isinstance(kind, list) else [kind])


def test_quiet_calls_draw_nothing() -> None:
    x = torch.ones(2, 2)
    made = {F.linear: (x, x), F.relu: (x,), F.softmax: (x, 1), torch.matmul: (x, x), Tensor.add: (x, x)}
    for func, arguments in made.items():
        assert func in QUIET
        state = torch.get_rng_state()
        func(*arguments)  # type: ignore[operator]
        assert torch.equal(torch.get_rng_state(), state)


def test_readers_that_change_an_argument_change_its_version() -> None:
    for func in READERS & {Tensor.add_, Tensor.mul_, Tensor.sub_, Tensor.copy_}:
        x = torch.ones(2)
        version = x._version
        func(x, torch.ones(2))
        assert x._version > version
