"""The diagnostics: what each measures, and what it needs to have seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backforward import probes, shift
from backforward.groups import Group
from backforward.probes import UnitMoments
from backforward.shift import Update, Watch

Need = Literal["batch", "images", "training images"]

CHUNK = 250  # images in one forward
JACOBIAN_SAMPLES = 4
VALUES = 10_000  # pre-activations of a unit, over images and positions (one for each image, should there be more)
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}  # over units
CURVATURE_IMAGES = 250  # of the training set at most, for sharpness: a Hessian-vector product costs as much as 3 steps
GRAPH_BYTES = 2**28  # what autograd may hold for a Hessian-vector product; at its peak this takes twice as much
INCOHERENT = 0.3  # two filters are, below this |cosine|
HISTOGRAM_LIMIT = 1e20  # where TensorBoard's bins end


class Measure(NamedTuple):
    """One number.

    Attributes:
        name: What it is, as `group/quantity`.
        value: A number, or a scalar tensor, which is read from its device together with all others.
        layer: The layer that it belongs to; empty: the whole network.
        update: Which update of the batch it belongs to, from 1.
    """

    name: str
    value: Tensor | float
    layer: str = ""
    update: int = 1

    @property
    def tag(self) -> str:
        """Its name in TensorBoard."""
        later = f"update{self.update}" if self.update > 1 else ""
        return "/".join(filter(None, [self.name, self.layer, later]))


@dataclass
class WatchedBatch:
    """A batch that was watched.

    Attributes:
        watch: Holds the copy of the network, and how things stood when the batch began.
        updates: What the update rule did.
        loss: Maps the copy to the loss of this batch, in the mode of training.
        loss_before: The loss before any update, as the rule reported it.
        reduce: Averages a flat gradient over ranks; None for one process.
    """

    watch: Watch
    updates: list[Update]
    loss: Callable[[nn.Module], Tensor]
    loss_before: Tensor
    reduce: Callable[[Tensor], Tensor] | None = None


class Held:
    """Images to look at, class-balanced and the same at every time.

    Args:
        x: uint8 `[N, C, H, W]`.
        y: Labels `[N]`.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def floats(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """In batches, in [0, 1]."""
        for chunk in self.x.split(CHUNK):
            yield chunk.to(dtype) / 255


class Scene:
    """What diagnostics can measure at one moment. Expensive values are computed lazily and cached.

    Args:
        replica: The copy of the network, at the present weights and in evaluation mode (a diagnostic of the batch may
            overwrite both).
        layers: The copy's layers, in forward order.
        validation: Held-out images.
        training: Images of the training set, where a diagnostic needs them.
        batch: The batch just trained on, where a diagnostic needs it.
    """

    def __init__(
        self,
        replica: nn.Module,
        layers: Sequence[Group],
        validation: Held,
        training: Held | None = None,
        batch: WatchedBatch | None = None,
    ) -> None:
        self.replica, self.layers = replica, layers
        self.validation = validation
        self._training, self._batch = training, batch
        modules = dict(replica.named_modules())
        self.names = [
            layer.name for layer in layers if layer.name in modules
        ]  # a layer may lie in no module of its own

    @property
    def batch(self) -> WatchedBatch:
        """The batch just trained on."""
        assert self._batch is not None, "nobody declared the need for it"
        return self._batch

    @property
    def training(self) -> Held:
        """Images of the training set."""
        assert self._training is not None, "nobody declared the need for them"
        return self._training

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.replica.parameters()).dtype

    @cached_property
    def inputs(self) -> tuple[dict[str, UnitMoments], dict[str, Tensor]]:
        """By layer: moments of its input over the held-out images, and the values that some of them gave."""
        return probes.input_moments(self.replica, self.names, self.validation.floats(self.dtype))

    @cached_property
    def spectra(self) -> dict[str, list[probes.Spectrum]]:
        """By layer: of its block's Jacobian at a few held-out images."""
        blocks = {name: shift.block_name(name, self.names) for name in self.names}
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                seen[name] = arguments[0].clone()

            return before

        handles = [
            self.replica.get_submodule(block).register_forward_pre_hook(hook(name)) for name, block in blocks.items()
        ]
        try:
            with torch.no_grad():
                self.replica(self.validation.x[:JACOBIAN_SAMPLES].to(self.dtype) / 255)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: [
                probes.spectrum(probes.layer_jacobian(self.replica.get_submodule(blocks[name]), sample)) for sample in x
            ]
            for name, x in seen.items()
        }


class Diagnostic(ABC):
    """Measures something.

    Attributes:
        needs: What must have been kept for it: `batch`, that the batch was watched; `images`, that there are held-out
            images to look at; `training images`, the same of the training set.
        charts: By title, the measures that go into one chart of TensorBoard's custom layout, a line a layer.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    charts: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Measure."""

    def show(self, scene: Scene, writer: Any, step: int) -> None:  # noqa: B027 (most have nothing to show)
        """Write what is no number to TensorBoard."""

    def state_dict(self) -> dict[str, Any]:
        """What it must remember from one time to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most remember nothing)
        """Restore it."""


class CovariateShift(Diagnostic):
    """Induced and applied shift of each layer, in each update of the batch (see `backforward.shift`)."""

    needs = frozenset({"batch"})
    charts: ClassVar = {
        "induced shift, share of the gradient": "shift/induced_relative",
        "applied shift, share of the gradient": "shift/applied_relative",
    }

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Per layer and update: L2, relative L2, cosine."""
        batch = scene.batch

        def loss(replica: nn.Module) -> Tensor:
            batch.watch.as_before()
            return batch.loss(replica)

        for k, update in enumerate(batch.updates, start=1):
            found = shift.covariate_shift(scene.replica, scene.layers, update, loss, batch.reduce)
            for layer, induced, applied in found:
                for kind, values in (("induced", induced), ("applied", applied)):
                    if values is not None:
                        yield Measure(f"shift/{kind}", values.distance, layer, k)
                        yield Measure(f"shift/{kind}_relative", values.relative, layer, k)
                        yield Measure(f"shift/{kind}_cosine", values.cosine, layer, k)


class UpdateSize(Diagnostic):
    """What the batch did to the weights, and to the loss on itself."""

    needs = frozenset({"batch"})
    charts: ClassVar = {"update, share of the weights": "update/relative"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Norms, per layer and of all: weights before, update over the whole batch, gradient of its first update."""
        batch = scene.batch
        own = list(scene.replica.parameters())
        place = {id(p): i for i, p in enumerate(own)}
        before, after = batch.updates[0].before, batch.updates[-1].after
        squares = []
        for layer in scene.layers:
            places = [place[id(p)] for p in layer.parameters]
            gradients = [g for i in places if (g := batch.updates[0].gradients[i]) is not None]
            square = torch.stack(
                [
                    _square([before[i] for i in places]),
                    _square([after[i] - before[i] for i in places]),
                    _square(gradients) if gradients else before[places[0]].new_zeros((), dtype=torch.float64),
                ]
            )
            squares.append(square)
            yield from self._norms(square, layer.name)
        yield from self._norms(torch.stack(squares).sum(dim=0), "total")

        shift.write(own, after)
        batch.watch.as_before()
        with torch.no_grad():
            loss = batch.loss(scene.replica).reshape(1)
        loss = loss if batch.reduce is None else batch.reduce(loss)
        before_it = batch.loss_before.reshape(1)
        before_it = before_it if batch.reduce is None else batch.reduce(before_it)
        yield Measure("update/loss_change", (loss - before_it)[0])

    @staticmethod
    def _norms(squares: Tensor, layer: str) -> Iterator[Measure]:
        weight, update, gradient = squares.sqrt()
        yield Measure("update/weight_norm", weight, layer)
        yield Measure("update/norm", update, layer)
        yield Measure("update/relative", update / weight, layer)
        yield Measure("update/gradient_norm", gradient, layer)


class InputDistribution(Diagnostic):
    """What arrives at each layer, over held-out images, in evaluation mode.

    One unit of each layer, drawn once, is what figure 2 of Normalization Propagation shows; all units are measured too.
    """

    needs = frozenset({"images"})
    charts: ClassVar = {
        "mean input of one unit": "input/unit_mean",
        "distance of mean inputs from zero": "input/mean_distance",
        "drift of the inputs": "input/drift",
    }

    def __init__(self) -> None:
        self._then: dict[str, UnitMoments] = {}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Mean and std of the one unit; over all units, means of mean, |mean|, std; drift since the last time."""
        moments, _ = scene.inputs
        for k, (name, now) in enumerate(moments.items()):
            unit = int(torch.randint(len(now.mean), (), generator=torch.Generator().manual_seed(k)))
            yield Measure("input/unit_mean", now.mean[unit], name)
            yield Measure("input/unit_std", now.std[unit], name)
            yield Measure("input/mean", now.mean.mean(), name)
            yield Measure("input/mean_distance", now.mean.abs().mean(), name)
            yield Measure("input/std", now.std.mean(), name)
            if name in self._then:
                then = UnitMoments(*(value.to(now.mean.device) for value in self._then[name]))
                yield Measure("input/drift", probes.drift(now, then), name)
        self._then = dict(moments)

    def state_dict(self) -> dict[str, Any]:
        """The last moments."""
        return {name: tuple(moments) for name, moments in self._then.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._then = {name: UnitMoments(*moments) for name, moments in state.items()}


class PreActivations(Diagnostic):
    """How near to normal each unit's pre-activations are, over held-out images, in evaluation mode."""

    needs = frozenset({"images"})
    charts: ClassVar = {"distance of pre-activations from a normal distribution": "gaussianity/distance_median"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Median, 5 and 95 percent over units of each; a unit that never changes is left out."""
        images = scene.validation
        found = probes.pre_activations(
            scene.replica, scene.names, images.floats(scene.dtype), max(1, VALUES // len(images.x))
        )
        for name, values in found.items():
            for kind, of_units in probes.gaussianity(values)._asdict().items():
                shares = torch.tensor(list(QUANTILES.values()), dtype=of_units.dtype, device=of_units.device)
                for quantile, value in zip(QUANTILES, torch.nanquantile(of_units, shares), strict=True):
                    yield Measure(f"gaussianity/{kind}_{quantile}", value, name)


class Histograms(Diagnostic):
    """Histograms of what arrives at each layer, all units together, and of the weights."""

    needs = frozenset({"images"})

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """None: a histogram is no number."""
        yield from ()

    def show(self, scene: Scene, writer: Any, step: int) -> None:
        """Write them."""
        values = {f"input/{name}": seen for name, seen in scene.inputs[1].items()}
        values |= {f"weight/{layer.name}": layer.parameters[0].detach() for layer in scene.layers}
        for tag, value in values.items():
            within = value[value.abs() < HISTOGRAM_LIMIT]  # also no NaN
            if len(within):
                writer.add_histogram(tag, within.float().cpu(), step)


class LayerJacobian(Diagnostic):
    """Jacobian of each layer with its normalisation and activation, at held-out images, in evaluation mode."""

    needs = frozenset({"images"})
    charts: ClassVar = {"mean squared singular value": "jacobian/mean_squared"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Singular values, means over images; the diagonal of E[J J^T], whose mean is the mean squared singular value.

        Of m units, m squared singular values are averaged: those beyond the number of inputs are 0.
        """
        for name, spectra in scene.spectra.items():
            largest = torch.stack([found.singular.max() for found in spectra]).mean()
            median = torch.stack([found.singular.median() for found in spectra]).mean()
            smallest = torch.stack([found.singular.min() for found in spectra]).mean()
            diagonal = torch.stack([found.diagonal for found in spectra]).mean(dim=0)
            yield Measure("jacobian/largest", largest, name)
            yield Measure("jacobian/median", median, name)
            yield Measure("jacobian/smallest", smallest, name)
            yield Measure("jacobian/mean_squared", diagonal.mean(), name)
            yield Measure("jacobian/diagonal_std", diagonal.std(correction=0), name)
            yield Measure("jacobian/diagonal_min", diagonal.min(), name)
            yield Measure("jacobian/diagonal_max", diagonal.max(), name)


class Proposition1(Diagnostic):
    """How incoherent the filters are, and Proposition 1 of Normalization Propagation (see `probes.Incoherence`)."""

    charts: ClassVar = {"coherence of the filters": "proposition1/coherence"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Pairs of filters, how many are incoherent, their largest |cosine|; then Proposition 1.

        That is, on white input: what is off the diagonal of the covariance, the printed bound (NaN where imaginary),
        the one that holds.
        """
        for name in scene.names:
            weight = getattr(scene.replica.get_submodule(name), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) > 1:
                found = probes.incoherence(weight)
                cosines = probes.cosines_of_pairs(weight)
                yield Measure("proposition1/pairs", len(cosines), name)
                yield Measure("proposition1/incoherent_pairs", (cosines < INCOHERENT).sum(), name)
                yield Measure("proposition1/coherence", found.coherence, name)
                yield Measure("proposition1/distance", found.distance, name)
                yield Measure("proposition1/printed_bound", found.printed, name)
                yield Measure("proposition1/mended_bound", found.mended, name)


class Sharpness(Diagnostic):
    """Largest eigenvalue of the Hessian of the loss on fixed training images, in evaluation mode."""

    needs = frozenset({"training images"})
    charts: ClassVar = {"largest eigenvalue of the Hessian": "sharpness"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """From Hessian-vector products, over as many images at a time as there is room for."""
        images, count = scene.training, len(scene.training.y)

        def part(start: int, stop: int) -> Callable[[nn.Module], Tensor]:
            def loss(network: nn.Module) -> Tensor:
                x = images.x[start:stop].to(scene.dtype) / 255
                return F.cross_entropy(network(x), images.y[start:stop], reduction="sum") / count

            return loss

        one, two = (probes.graph_bytes(scene.replica, part(0, stop)) for stop in (1, 2))
        room = GRAPH_BYTES // max(1, two - one)
        losses = [part(start, start + room) for start in range(0, count, room)]
        yield Measure("sharpness", probes.sharpness(scene.replica, losses))


class Pictures(Diagnostic):
    """Figures, where a picture says more than a line."""

    needs = frozenset({"images"})

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """None."""
        yield from ()

    def show(self, scene: Scene, writer: Any, step: int) -> None:
        """Write them."""
        from backforward_suite.train.callbacks import figures

        writer.add_figure("figure/inputs", figures.inputs(scene.inputs[0]), step)
        writer.add_figure("figure/jacobian", figures.spectra(scene.spectra), step)


#: By key of the `diagnostics` config, in the order of measuring.
DIAGNOSTICS: dict[str, type[Diagnostic]] = {
    "shift": CovariateShift,
    "update": UpdateSize,
    "inputs": InputDistribution,
    "gaussianity": PreActivations,
    "histograms": Histograms,
    "jacobian": LayerJacobian,
    "proposition1": Proposition1,
    "sharpness": Sharpness,
    "pictures": Pictures,
}


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all entries, float64."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()
