"""What Normalization Propagation rests on, measured on untrained layers.

Closed forms and bounds come from the library; this study compares them with random draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from backforward.models.init import generator, initialise_, undisturbed_generator
from backforward.moments import ACTIVATIONS, gaussian_moments, make_activation
from backforward.normprop import NormPropConv2d, NormPropLinear
from backforward.probes import RunningMoments, gaussianity, incoherence, layer_jacobian, spectrum
from backforward_suite.errors import BadInput
from backforward_suite.studies.study import Findings, Row, Setting

BATCHES = 100  # parts of a Monte Carlo sample, for its standard error
WEIGHTS = ("random", "orthogonal")  # rows of a layer whose Jacobian is measured
FILTERS = (1, 5)  # filter sizes before a pooling, as in the paper's network
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(3, 2, padding=1),
    "average": lambda: nn.AvgPool2d(3, 2, padding=1),
}

Where: TypeAlias = dict[str, float | str | None]


@dataclass(frozen=True)
class Moments:
    """Normalization Propagation's statements about untrained layers (Arpit et al., 3.1 to 3.4).

    White input is N(0, 1), independent in each feature. Rows of `study.csv` are in long form: ``part``, ``quantity``,
    ``value``, and columns that identify it.

    ============ ===================================================================================================
    part         content
    ============ ===================================================================================================
    moments      ``mean``, ``std``, ``jacobian`` (the exact J) of each ``activation`` under N(0, 1), by ``method``:
                 ``library`` (what layers use: a closed form if there is one), ``quadrature``, ``monte_carlo``, the
                 last with its standard ``error``
    chain        ``mean``, ``std`` of the output after ``layer`` layers on white input, over all units and inputs
                 together, and ``unit_std``, the mean over units of each one's own std; by ``activation``,
                 ``jacobian_factor``, ``width``
    jacobian     of the Jacobian G of one layer on white input, by ``activation``, ``jacobian_factor``, ``width`` and
                 random or orthogonal ``weights``: ``diagonal``, the mean diagonal entry of E[G G^T] (the mean squared
                 singular value); ``off_diagonal``, root mean square of the entries beside it; ``eigenvalue_min`` and
                 ``_max`` of the sampled E[G G^T], which few inputs make too wide; ``exact_eigenvalue_min`` and ``_max``
                 of E[G G^T] in closed form, of ReLU; ``singular_min``, ``_median``, ``_max`` of G at one input
    proposition1 of weights with ``rows`` x ``columns``, rows of one ``length`` and random, orthogonal, or equal: any
                 two at one ``cosine``. ``coherence``; ``distance``, ||Sigma - diag(alpha)||_F; ``sampled_distance``,
                 the same from the covariance of W x over white x, with its sampling ``error``; ``printed_bound`` (nan
                 where imaginary), ``mended_bound``
    pooling      ``mean``, ``std`` of a convolutional layer's output on white or data ``input``, by ``pooling``,
                 ``filter`` size and ``jacobian_factor``, over all channels, positions and images together;
                 ``unit_mean``, the mean over channels of |mean|, and ``unit_std``
    gaussianity  of that layer's pre-activations, medians over channels: ``skewness`` (its absolute value),
                 ``kurtosis`` (excess), ``distance`` to the normal (`shift.Gaussianity`)
    ============ ===================================================================================================

    In ``final``: ``moments/quadrature_difference``, the largest between library and quadrature;
    ``moments/monte_carlo_errors``, the largest between library and Monte Carlo, in standard errors;
    ``chain/FACTOR/mean|std/LAYER`` of the first activation at the largest width after the first and the last layer;
    ``jacobian/ACTIVATION/FACTOR``, the diagonal for random weights at the largest width; ``proposition1/cases``,
    ``.../printed_imaginary``, ``.../printed_exceeded``, ``.../mended_exceeded`` (numbers of cases);
    ``pooling/INPUT/POOLING/mean|std`` of the first activation after 5 x 5 filters, without J.

    Args:
        activations: Names in `normprop.ACTIVATIONS`. Poolings use only the first.
        samples: Draws of N(0, 1) for each activation.
        widths: Inputs and units of a layer in chains and Jacobians.
        depth: Layers of a chain.
        chain_inputs: White inputs of a chain.
        jacobian_rows: Rows of Jacobians to average over, at any width.
        shapes: Rows and columns of weights for Proposition 1.
        lengths: Of their rows.
        cosines: Between any two of their rows, where those are equal.
        covariance_inputs: White inputs of a sampled covariance.
        channels: Of the layer whose output is pooled.
        images: Number of images, of white noise and of the training set.

    Raises:
        ValueError: An activation is unknown, or a number is out of range.
    """

    activations: Sequence[str] = tuple(name for name in ACTIVATIONS if name != "identity")
    samples: int = 1_000_000
    widths: Sequence[int] = (64, 256, 1024)
    depth: int = 12
    chain_inputs: int = 1000
    jacobian_rows: int = 8192
    shapes: Sequence[Sequence[int]] = ((2, 8), (16, 64), (64, 256), (256, 1024))
    lengths: Sequence[float] = (0.5, 1.0, 2.0)
    cosines: Sequence[float] = (0.01, 0.7)
    covariance_inputs: int = 10_000
    channels: int = 64
    images: int = 200

    def __post_init__(self) -> None:
        for name in ("activations", "widths", "shapes", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"study.{name}: give at least one")
        for name in ("samples", "depth", "chain_inputs", "jacobian_rows", "covariance_inputs", "channels", "images"):
            _check_count(name, getattr(self, name))
        for width in self.widths:
            _check_count("widths", width)
        for activation in self.activations:
            make_activation(activation)
        if self.samples % BATCHES or self.samples < 10 * BATCHES:
            raise ValueError(f"study.samples={self.samples}: give a multiple of {BATCHES}, {10 * BATCHES} at least")
        for shape in self.shapes:
            if len(shape) != 2 or not 2 <= shape[0] < shape[1]:
                raise ValueError(f"study.shapes: {list(shape)} is not [rows, columns] with 2 <= rows < columns")
        if not all(length > 0 for length in self.lengths):
            raise ValueError("study.lengths: a length is more than 0")
        if not all(0 < cosine < 1 for cosine in self.cosines):
            raise ValueError("study.cosines: a cosine is more than 0 and less than 1")

    def __call__(self, setting: Setting) -> Findings:
        """Measure all parts.

        Raises:
            BadInput: There are fewer training images than `images`.
        """
        if self.images > len(setting.data.train):
            raise BadInput(f"study.images={self.images}: there are {len(setting.data.train)} training images")
        with_factors = [(name, factor) for name in self.activations for factor in _factors(name)]
        angles = [(kind, None) for kind in WEIGHTS] + [("equal", cosine) for cosine in self.cosines]
        measurements: list[Callable[[], Iterator[Row]]] = [
            *(partial(self.moments, setting, name) for name in self.activations),
            *(partial(self.chain, setting, width, *which) for width, which in product(self.widths, with_factors)),
            *(
                partial(self.jacobian, setting, width, *which, weights)
                for width, which, weights in product(self.widths, with_factors, WEIGHTS)
            ),
            *(
                partial(self.proposition1, setting, rows, columns, length, *angle)
                for (rows, columns), length, angle in product(self.shapes, self.lengths, angles)
            ),
            *(
                partial(self.pooling, setting, source, size, factor)
                for source, size, factor in product(("white", "data"), FILTERS, _factors(self.activations[0]))
            ),
        ]
        found = setting.track(measurements, total=len(measurements), what="moments")
        with undisturbed_generator():  # layers draw weights before they get those of the seed
            rows = [row for measure in found for row in measure()]
        return Findings(self._headlines(rows), rows)

    # --- the parts ---------------------------------------------------------------------------------------------------

    def moments(self, setting: Setting, activation: str) -> Iterator[Row]:
        """Moments of an activation under N(0, 1), computed in three ways."""
        act = ACTIVATIONS[activation]().double()
        draws = generator(setting.seed, "moments", activation)
        sampled, errors = _monte_carlo(act, torch.randn(self.samples, generator=draws, dtype=torch.float64))
        methods: dict[str, Sequence[Any]] = {
            "library": gaussian_moments(act),
            "quadrature": gaussian_moments(act.forward),  # a bare function has no closed form
            "monte_carlo": sampled,
        }
        for method, values in methods.items():
            for k, quantity in enumerate(("mean", "std", "jacobian")):
                row = _row("moments", quantity, _number(values[k]), activation=activation, method=method)
                yield {**row, "error": errors[k] if method == "monte_carlo" else None}

    def chain(self, setting: Setting, width: int, activation: str, factor: str) -> Iterator[Row]:
        """Statistics after each of many layers on white input."""
        layers = [
            NormPropLinear(width, width, activation=activation, jacobian_factor=factor) for _ in range(self.depth)
        ]
        chain = _drawn(setting, nn.Sequential(*layers))
        x = _white(setting, "chain", self.chain_inputs, width)
        for number, layer in enumerate(chain.children(), start=1):
            x = layer(x)
            for quantity, value in _statistics(x).items():
                if quantity != "unit_mean":
                    row = _row("chain", quantity, value, activation=activation, jacobian_factor=factor, width=width)
                    yield {**row, "layer": number}

    def jacobian(self, setting: Setting, width: int, activation: str, factor: str, weights: str) -> Iterator[Row]:
        """E[G G^T] and singular values of a layer's Jacobian G on white input."""
        layer = NormPropLinear(width, width, activation=activation, jacobian_factor=factor)
        _drawn(setting, layer)
        if weights == "orthogonal":
            rows = torch.empty(width, width)
            layer.weight.copy_(nn.init.orthogonal_(rows, generator=generator(setting.seed, "jacobian", width)))
        inputs = _white(setting, "jacobian", max(1, self.jacobian_rows // width), width)
        first = layer_jacobian(layer, inputs[0]).double()
        mean = first @ first.T
        for x in inputs[1:]:
            other = layer_jacobian(layer, x).double()
            mean += other @ other.T
        mean /= len(inputs)
        singular, eigenvalues = spectrum(first).singular, torch.linalg.eigvalsh(mean)
        beside = mean - mean.diagonal().diag()
        values = {
            "diagonal": mean.diagonal().mean(),
            "off_diagonal": beside.norm() / math.sqrt(max(1, width * (width - 1))),
            "eigenvalue_min": eigenvalues[0],
            "eigenvalue_max": eigenvalues[-1],
            "singular_min": singular[-1],
            "singular_median": singular.median(),
            "singular_max": singular[0],
        }
        if activation == "relu":
            exact = torch.linalg.eigvalsh(expected_relu_product(layer))
            values |= {"exact_eigenvalue_min": exact[0], "exact_eigenvalue_max": exact[-1]}
        where: Where = {"activation": activation, "jacobian_factor": factor, "width": width, "weights": weights}
        for quantity, value in values.items():
            yield _row("jacobian", quantity, value.item(), **where)

    def proposition1(
        self, setting: Setting, rows: int, columns: int, length: float, weights: str, cosine: float | None
    ) -> Iterator[Row]:
        """The off-diagonal part of W x's covariance on white x, and the bounds."""
        draws = generator(setting.seed, "proposition1", rows, columns)
        if weights == "random":
            W = torch.randn(rows, columns, generator=draws, dtype=torch.float64)
            W /= W.norm(dim=1, keepdim=True)
        else:
            basis = nn.init.orthogonal_(torch.empty(rows + 1, columns, dtype=torch.float64), generator=draws)
            shared = cosine or 0.0
            W = math.sqrt(1 - shared) * basis[1:] + math.sqrt(shared) * basis[0]
        W *= length
        x = torch.randn(self.covariance_inputs, columns, generator=draws, dtype=torch.float64)
        bound, sigma, sampled = incoherence(W), W @ W.T, torch.cov((x @ W.T).T, correction=0)
        alpha = sigma.diagonal()
        values = {
            "coherence": bound.coherence,
            "distance": bound.distance,
            "sampled_distance": (sampled - alpha.diag()).norm(),
            "printed_bound": bound.printed,
            "mended_bound": bound.mended,
        }
        # Each entry of a covariance sampled from n normal draws has the variance (alpha_i alpha_j + sigma_ij^2) / n.
        error = ((alpha.sum().square() + sigma.square().sum()) / self.covariance_inputs).sqrt().item()
        where: Where = {"rows": rows, "columns": columns, "length": length, "weights": weights, "cosine": cosine}
        for quantity, value in values.items():
            row = _row("proposition1", quantity, value.item(), **where)
            yield {**row, "error": error if quantity == "sampled_distance" else None}

    def pooling(self, setting: Setting, source: str, size: int, factor: str) -> Iterator[Row]:
        """A convolutional layer's output before and after pooling, and its pre-activations."""
        shape, activation = setting.data.shape, self.activations[0]
        layer = NormPropConv2d(
            shape[0], self.channels, size, padding=size // 2, activation=activation, jacobian_factor=factor
        )
        _drawn(setting, layer)
        if source == "white":
            x = _white(setting, "pooling", self.images, *shape)
        else:
            images, _ = setting.batch(setting.data.train.take(slice(self.images)))
            with torch.no_grad():
                x = setting.network(setting.seed).get_submodule("data_norm")(images)
        where: Where = {"input": source, "filter": size, "activation": activation, "jacobian_factor": factor}
        with torch.no_grad():
            z, output = layer.pre_activation(x), layer(x)
        for name, pool in POOLINGS.items():
            for quantity, value in _statistics(pool()(output)).items():
                yield _row("pooling", quantity, value, pooling=name, **where)
        normal = gaussianity(z.movedim(1, -1).flatten(0, -2))
        values = {
            "skewness": normal.skewness.abs(),
            "kurtosis": normal.kurtosis,
            "distance": normal.distance,
        }
        for quantity, of_channels in values.items():
            yield _row("gaussianity", quantity, of_channels.nanmedian().item(), **where)

    # --- headline numbers --------------------------------------------------------------------------------------------

    def _headlines(self, rows: Sequence[Row]) -> dict[str, float]:
        widest, first = max(self.widths), self.activations[0]
        found = {
            method: _column(rows, {"part": "moments", "method": method})
            for method in ("library", "quadrature", "monte_carlo")
        }
        errors = _column(rows, {"part": "moments", "method": "monte_carlo"}, "error")
        final = {
            "moments/quadrature_difference": (found["library"] - found["quadrature"]).abs().max().item(),
            "moments/monte_carlo_errors": ((found["library"] - found["monte_carlo"]) / errors).abs().max().item(),
        }
        for factor, quantity, layer in product(_factors(first), ("mean", "std"), sorted({1, self.depth})):
            where: dict[str, object] = {"activation": first, "jacobian_factor": factor, "width": widest, "layer": layer}
            value = _column(rows, {"part": "chain", "quantity": quantity, **where})
            final[f"chain/{factor}/{quantity}/{layer}"] = value.item()
        for name in self.activations:
            for factor in _factors(name):
                where = {"activation": name, "jacobian_factor": factor, "width": widest, "weights": "random"}
                value = _column(rows, {"part": "jacobian", "quantity": "diagonal", **where})
                final[f"jacobian/{name}/{factor}"] = value.item()
        distance, printed, mended = (
            _column(rows, {"part": "proposition1", "quantity": quantity})
            for quantity in ("distance", "printed_bound", "mended_bound")
        )
        slack = 1e-9 * (1 + mended)  # equal rows reach the bound, up to rounding
        final |= {
            "proposition1/cases": len(distance),
            "proposition1/printed_imaginary": int(printed.isnan().sum()),
            "proposition1/printed_exceeded": int((distance > printed + slack).sum()),
            "proposition1/mended_exceeded": int((distance > mended + slack).sum()),
        }
        for source, pooling, quantity in product(("white", "data"), POOLINGS, ("mean", "std")):
            where = {"input": source, "pooling": pooling, "filter": FILTERS[-1], "jacobian_factor": "none"}
            value = _column(rows, {"part": "pooling", "quantity": quantity, **where})
            final[f"pooling/{source}/{pooling}/{quantity}"] = value.item()
        return final


def _number(value: float | Tensor) -> float:
    """PReLU's moments are tensors, all others are numbers."""
    return value.item() if isinstance(value, Tensor) else value


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"study.{name}={value!r}: must be an integer >= 1")


def _factors(activation: str) -> tuple[str, ...]:
    """The Jacobian factors to compare; the paper prints one for ReLU alone."""
    return ("none", "paper", "exact") if activation == "relu" else ("none", "exact")


def _row(part: str, quantity: str, value: float, **where: float | str | None) -> Row:
    return {"part": part, "quantity": quantity, "value": value, **where}


def _column(rows: Sequence[Row], where: Mapping[str, object], key: str = "value") -> Tensor:
    """The values of the rows with these other columns, float64."""
    chosen: list[Any] = [row[key] for row in rows if all(row.get(name) == wanted for name, wanted in where.items())]
    return torch.tensor(chosen, dtype=torch.float64)


def _white(setting: Setting, purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(setting.seed, purpose, *shape)).to(setting.device, setting.dtype)


def expected_relu_product(layer: NormPropLinear) -> Tensor:
    r"""E[G G^T] of a fresh NormProp layer of ReLU on white Gaussian input, in closed form.

    With unit rows at cosine r, two pre-activations are both positive with probability 1/4 + asin(r) / (2 pi) (Sheppard
    1899), and then the gradients of the two units have the product r / (J s)^2, s the deviation of a rectified normal.
    Tests compare it with samples.

    Returns:
        units x units, double precision.
    """
    rows = layer.weight.detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines: torch.Tensor = (rows @ rows.T).clamp(-1, 1)
    cosines.fill_diagonal_(1.0)
    moments = layer.moments()
    scale = float(moments.jacobian) * float(moments.std)
    found: Tensor = cosines * (0.25 + cosines.asin() / (2 * math.pi)) / scale**2
    return found


def _drawn(setting: Setting, network: nn.Module) -> nn.Module:
    """With the weights of this seed, frozen."""
    initialise_(network, "glorot", setting.seed)
    return network.requires_grad_(False).to(setting.device, setting.dtype)


def _statistics(x: Tensor) -> dict[str, float]:
    """Statistics of values ``[N, units, ...]``: over all of them together, and means over units."""
    running = RunningMoments()
    running.add(x, 1)
    unit = running.result()
    mean = unit.mean.mean()
    square = (unit.std.square() + unit.mean.square()).mean()
    return {
        "mean": mean.item(),
        "std": (square - mean.square()).sqrt().item(),
        "unit_mean": unit.mean.abs().mean().item(),
        "unit_std": unit.std.mean().item(),
    }


def _monte_carlo(act: Callable[[Tensor], Tensor], z: Tensor) -> tuple[list[float], list[float]]:
    """Mean, std and exact J of act(z) over a sample, and their standard errors, from those of its parts."""
    z = z.requires_grad_()
    y = act(z.clone())  # a copy, as some activations work in place
    (slope,) = torch.autograd.grad(y.sum(), z)

    def of(y: Tensor, slope: Tensor) -> Tensor:
        std, mean = torch.std_mean(y, dim=-1, correction=0)
        return torch.stack([mean, std, slope.square().mean(dim=-1).sqrt() / std])

    y = y.detach()
    parts = of(y.view(BATCHES, -1), slope.view(BATCHES, -1))
    errors: list[float] = (parts.std(dim=1) / math.sqrt(BATCHES)).tolist()
    values: list[float] = of(y, slope).tolist()
    return values, errors
