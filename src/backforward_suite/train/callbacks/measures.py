"""The diagnostics: what each needs and measures."""

from __future__ import annotations

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
VALUES = 10_000  # pre-activations per unit, over images and positions (at least one per image)
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}  # over units
CURVATURE_IMAGES = 250  # training images for sharpness: a Hessian-vector product costs as much as 3 steps
GRAPH_BYTES = 2**28  # of autograd's graph for a Hessian-vector product, which takes twice as much at its peak
INCOHERENT = 0.3  # two filters are incoherent below this |cosine|
HISTOGRAM_LIMIT = 1e20  # where TensorBoard's bins end


class Measure(NamedTuple):
    """One number.

    Attributes:
        name: `group/quantity`.
        value: A number, or a scalar tensor, which is read from its device together with all others.
        layer: The layer's name; empty for the whole network.
        update: The number of the update within the batch, from 1.
    """

    name: str
    value: Tensor | float
    layer: str = ""
    update: int = 1

    @property
    def tag(self) -> str:
        """The name in TensorBoard."""
        later = f"update{self.update}" if self.update > 1 else ""
        return "/".join(filter(None, [self.name, self.layer, later]))


@dataclass
class WatchedBatch:
    """A batch that was watched.

    Attributes:
        watch: Has the copy of the network, and the state at the start of the batch.
        updates: The updates that the rule made.
        loss: Maps the copy to the loss on this batch, in training mode.
        loss_before: The loss before any update, as reported by the rule.
        reduce: Averages a flat gradient over ranks; None for one process.
    """

    watch: Watch
    updates: list[Update]
    loss: Callable[[nn.Module], Tensor]
    loss_before: Tensor
    reduce: Callable[[Tensor], Tensor] | None = None


class Held:
    """Images to measure on, class-balanced and always the same.

    Args:
        x: uint8 `[N, C, H, W]`.
        y: Labels `[N]`.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def floats(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the images in chunks, in [0, 1]."""
        for chunk in self.x.split(CHUNK):
            yield chunk.to(dtype) / 255


class Scene:
    """What diagnostics can measure at one step. Expensive values are computed lazily and cached.

    Args:
        replica: The copy of the network, with the current weights and in evaluation mode (diagnostics of the batch may
            overwrite both).
        layers: The copy's layers, in forward order.
        validation: Validation images.
        training: Training images, if a diagnostic needs them.
        batch: The batch just trained on, if a diagnostic needs it.
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
        assert self._batch is not None, "not in `needs`"
        return self._batch

    @property
    def training(self) -> Held:
        """Training images."""
        assert self._training is not None, "not in `needs`"
        return self._training

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.replica.parameters()).dtype

    @cached_property
    def inputs(self) -> tuple[dict[str, UnitMoments], dict[str, Tensor]]:
        """By layer, the moments of its input over the validation images, and its input for some of them."""
        return probes.input_moments(self.replica, self.names, self.validation.floats(self.dtype))

    @cached_property
    def spectra(self) -> dict[str, list[probes.Spectrum]]:
        """By layer, the spectrum of its block's Jacobian at a few validation images."""
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


class Diagnostic:
    """One diagnostic.

    Attributes:
        needs: `batch`: the batch must be watched; `images`: validation images; `training images`: training images.
        charts: By title, the measures in a chart of TensorBoard's custom layout, one line per layer.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    charts: ClassVar[Mapping[str, str]] = {}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Yield the numbers, if it has any."""
        yield from ()

    def show(self, scene: Scene, writer: Any, step: int) -> None:
        """Write figures and histograms to TensorBoard."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it needs at the next measurement."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
    """The change of the weights by the batch, and of the loss on it."""

    needs = frozenset({"batch"})
    charts: ClassVar = {"update, share of the weights": "update/relative"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Norms per layer and in total: weights before, update over the whole batch, gradient of its first update."""
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
    """The input of each layer over validation images, in evaluation mode.

    One unit of each layer, drawn once, as in figure 2 of Normalization Propagation, and all units.
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
        """Mean and std of the one unit; means over units of mean, |mean| and std; drift since the last measurement."""
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
        """Return the last moments."""
        return {name: tuple(moments) for name, moments in self._then.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._then = {name: UnitMoments(*moments) for name, moments in state.items()}


class PreActivations(Diagnostic):
    """How close each unit's pre-activations are to normal, over validation images, in evaluation mode."""

    needs = frozenset({"images"})
    charts: ClassVar = {"distance of pre-activations from a normal distribution": "gaussianity/distance_median"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Median, 5 % and 95 % quantile of each over units, without units that never change."""
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
    """Histograms of each layer's input, all units together, and of its weights."""

    needs = frozenset({"images"})

    def show(self, scene: Scene, writer: Any, step: int) -> None:
        """Write the histograms."""
        values = {f"input/{name}": seen for name, seen in scene.inputs[1].items()}
        values |= {f"weight/{layer.name}": layer.parameters[0].detach() for layer in scene.layers}
        for tag, value in values.items():
            within = value[value.abs() < HISTOGRAM_LIMIT]  # this drops NaN as well
            if len(within):
                writer.add_histogram(tag, within.float().cpu(), step)


class LayerJacobian(Diagnostic):
    """Jacobian of each layer with its normalisation and activation, at validation images, in evaluation mode."""

    needs = frozenset({"images"})
    charts: ClassVar = {"mean squared singular value": "jacobian/mean_squared"}

    def measure(self, scene: Scene) -> Iterator[Measure]:
        """Singular values, means over images; the diagonal of E[J J^T], whose mean is the mean squared singular value.

        The mean is over m squared singular values, m the number of units: those beyond the number of inputs are 0.
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
        """Pairs of filters, incoherent pairs, the largest |cosine|; then both sides of Proposition 1, on white input.

        These are the norm of the covariance off the diagonal, the printed bound (NaN where it is imaginary), and the
        corrected bound.
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
        """Use Hessian-vector products, over as many images at a time as fit into `GRAPH_BYTES`."""
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
    """Figures of all layers at once."""

    needs = frozenset({"images"})

    def show(self, scene: Scene, writer: Any, step: int) -> None:
        """Write the figures."""
        from backforward_suite.train.callbacks import figures

        writer.add_figure("figure/inputs", figures.inputs(scene.inputs[0]), step)
        writer.add_figure("figure/jacobian", figures.spectra(scene.spectra), step)


#: By key of the `diagnostics` config, in the order of measurement.
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
    """Return the sum of squares of all entries, in float64."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()
