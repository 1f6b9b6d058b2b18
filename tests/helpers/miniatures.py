"""Small optimizers written by hand, one for each way in which optimizers from elsewhere differ from torch's own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Mini(Optimizer):
    """Gradient descent by `scale` of each step, which subclasses count in their own way."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            scale = group["lr"] * self.scale(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * scale)

    def scale(self, group: dict[str, Any]) -> Any:
        return 1.0


class CountsInGroups(Mini):
    """A warm-up counted in `param_groups`, as schedule-free optimizers and Prodigy do; one entry comes with a step."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, warmup: int = 9) -> None:
        super().__init__(params, lr, k=0, weight_sum=0.0, warmup=warmup)

    def scale(self, group: dict[str, Any]) -> float:
        group["k"] += 1
        group["weight_sum"] += group["lr"] ** 2
        group["last_lr"] = group["lr"]
        return min(1.0, group["k"] / group["warmup"]) / (1 + group["weight_sum"])


class CountsInGroupTensors(Mini):
    """The same in a tensor that changes in place."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["count"] = torch.zeros(())

    def scale(self, group: dict[str, Any]) -> Tensor:
        group["count"].add_(1)
        return (group["count"] / 9).clamp(max=1)


class CountsInAttributes(Mini):
    """Attributes: a number, a list and a tensor that change in place, and one that the first step makes."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self._step = 0
        self.history: list[float] = []
        self.total = torch.zeros(2)
        self.nothing = float("nan")

    def scale(self, group: dict[str, Any]) -> Any:
        self._step += 1
        self.history.append(group["lr"])
        self.total.add_(1)
        self.late = getattr(self, "late", 0) + 2
        return (self._step + len(self.history) + self.total.sum() + self.late) / 40


class CountsInState(Mini):
    """Entries of `state` that belong to no parameter: one from the start, one from the first step on."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.state["all"] = {"step": 0}

    def scale(self, group: dict[str, Any]) -> Any:
        self.state["all"]["step"] += 1
        if "k" not in self.state:
            self.state["k"] = torch.zeros(1)
        self.state["k"].add_(1)
        return (self.state["all"]["step"] + self.state["k"]) / 20


class ChangesItsLearningRate(Mini):
    """The step itself decays the learning rate."""

    def scale(self, group: dict[str, Any]) -> float:
        group["lr"] *= 0.8
        return 1.0


class NormOfAll(Mini):
    """Scales by the norm of all gradients it sees and before, as clipping in LAMB does."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr, norms=0.0)

    def scale(self, group: dict[str, Any]) -> float:
        seen = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        group["norms"] = 0.5 * group["norms"] + float(nn.utils.get_total_norm(seen)) * len(seen)
        return 1 / (1 + group["norms"])


class NeedsEveryGradient(Mini):
    """Reads all gradients unasked, as Muon's own package does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad.data, 0.5)
                p.sub_(buffer, alpha=group["lr"])


class Draws(Mini):
    """Draws random numbers."""

    def scale(self, group: dict[str, Any]) -> Tensor:
        return torch.rand(())


class ScheduleFree(Mini):
    """SGD with an average of its iterates, evaluated at the average: `train()` and `eval()` swap the weights."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, warmup: int = 9, beta: float = 0.9) -> None:
        super().__init__(params, lr, k=0, weight_sum=0.0, warmup=warmup, beta=beta, train_mode=False)

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - group["beta"] if train else 1 - 1 / group["beta"])
            group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() first")
            group["k"] += 1
            lr = group["lr"] * min(1.0, group["k"] / group["warmup"])
            group["weight_sum"] += lr**2
            share = lr**2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, share)
                    p.sub_(p.grad, alpha=lr * (1 - group["beta"] * (1 - share)))
                    z.sub_(p.grad, alpha=lr)


COUNTING: dict[str, type[Mini]] = {
    "in-groups": CountsInGroups,
    "in-group-tensors": CountsInGroupTensors,
    "in-attributes": CountsInAttributes,
    "in-state": CountsInState,
    "learning-rate": ChangesItsLearningRate,
    "norm-of-all": NormOfAll,
}


# --- what must be refused --------------------------------------------------------------------------------------------


class ClosureBySignature(Mini):
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()


class ClosureByAssertion(Mini):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is not None, "Needs a closure, but none was given"


class ReadsTheLoss(Mini):
    """Polyak's step, and a plain one where no closure is given."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        loss = 1.0 if closure is None else float(closure())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=group["lr"] * math.sqrt(loss))


class SecondDerivatives(Mini):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in held]
        for p, curvature in zip(held, torch.autograd.grad(gradients, held, gradients), strict=True):
            p.data.sub_(p.grad / curvature)


class OwnLoop(Mini):
    def update_hessian(self) -> None: ...


class Wraps(Mini):
    def __init__(self, params: Iterable[Any]) -> None:
        self.inner = torch.optim.SGD(list(params), lr=0.1)
        super().__init__(self.inner.param_groups)


class _Schedule:
    def __init__(self) -> None:
        self.steps = 0


class KeepsObjects(Mini):
    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.schedule = _Schedule()

    def scale(self, group: dict[str, Any]) -> float:
        self.schedule.steps += 1
        return 1 / self.schedule.steps


class CannotBeCopied(Mini):
    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.lock = threading.Lock()


class Fails(Mini):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        raise NotImplementedError("use fit() instead\nof step()")
