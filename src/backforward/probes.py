"""Measures a network at one moment: distributions in its layers, their Jacobians, coherence, sharpness.

The functions change only the copy that they are given, and its generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Loss = Callable[[nn.Module], Tensor]

# --- Distributions ----------------------------------------------------------------------------------------------------


KEPT = 25  # number of samples whose values `input_moments` returns


class UnitMoments(NamedTuple):
    """Mean and standard deviation of each unit (channel or feature) over samples and positions.

    Attributes:
        mean: ``[units]``, float64.
        std: ``[units]``, float64.
    """

    mean: Tensor
    std: Tensor


class RunningMoments:
    """Moments of values that come in batches, by merging each batch's moments (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._square = torch.zeros(())

    def add(self, values: Tensor, unit: int) -> None:
        """Add values; their units lie along the axis `unit`."""
        unit %= values.ndim
        others = [axis for axis in range(values.ndim) if axis != unit]
        # Two passes over the differences from one value per unit: torch.var_mean takes ten times as long on a CPU, and
        # this way a constant unit has exactly zero variance.
        values = values if values.dtype == torch.float64 else values.float()
        one = values[tuple(slice(None) if axis == unit else slice(1) for axis in range(values.ndim))]
        away = values - one
        centre = away.mean(dim=others, keepdim=True)
        mean = one.flatten().double() + centre.flatten().double()
        square = away.sub_(centre).square_().mean(dim=others).double()
        count = values.numel() // len(mean)
        if not self._count:
            self._mean, self._square = mean, square * count
        else:
            total, apart = self._count + count, mean - self._mean
            self._mean = self._mean + apart * (count / total)
            self._square = self._square + square * count + apart.square() * (self._count * count / total)
        self._count += count

    def result(self) -> UnitMoments:
        """Return the moments of all values so far."""
        return UnitMoments(self._mean, (self._square / self._count).sqrt())


def unit_axis(layer: nn.Module) -> int:
    """Return the axis of the units in a layer's input: the channels of a convolution, else the last axis."""
    weight = getattr(layer, "weight", None)
    return 1 if isinstance(weight, Tensor) and weight.ndim > 2 else -1


def input_moments(
    network: nn.Module, names: Sequence[str], batches: Iterable[Tensor]
) -> tuple[dict[str, UnitMoments], dict[str, Tensor]]:
    """Measure the input of each layer.

    Args:
        network: A copy of the network, in the mode to measure. Hooks are installed during the call.
        names: Layers to measure; a layer whose module is never called is left out.
        batches: Inputs of the network.

    Returns:
        By layer, the moments of each unit over all batches, and the values of the first `KEPT` samples, units last.
    """
    moments: dict[str, RunningMoments] = {}
    values: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                unit = unit_axis(module)
                moments.setdefault(name, RunningMoments()).add(arguments[0], unit)
                if name not in values:
                    values[name] = arguments[0][:KEPT].movedim(unit, -1).clone()

        return before

    _watch(network, batches, [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names])
    return {name: found.result() for name, found in moments.items()}, values


def _watch(network: nn.Module, batches: Iterable[Tensor], handles: Sequence[RemovableHandle]) -> None:
    """Run the batches through the network without gradients, then remove the hooks."""
    try:
        with torch.no_grad():
            for x in batches:
                network(x)
    finally:
        for handle in handles:
            handle.remove()


def drift(now: UnitMoments, then: UnitMoments) -> Tensor:
    """Return how far a layer's input has moved: the root mean square over units of the 2-Wasserstein distance.

    Between the normals N(a, s^2) and N(b, t^2) that distance is sqrt((a - b)^2 + (s - t)^2).
    """
    return ((now.mean - then.mean).square() + (now.std - then.std).square()).mean().sqrt()


def pre_activations(
    network: nn.Module, names: Sequence[str], batches: Iterable[Tensor], positions: int
) -> dict[str, Tensor]:
    """Return the output of each layer's linear map, before its activation and before a norm that follows.

    Such a norm is an affine map per unit, to which `gaussianity` is invariant (except that a negative scale changes the
    sign of the skewness). A module that contains its activation must have a method `pre_activation(x)`, as NormProp's
    layers do.

    Args:
        network: A copy of the network, in the mode to measure. Hooks are installed during the call.
        names: Layers to measure; a layer whose module is never called is left out.
        batches: Inputs of the network.
        positions: The largest number of positions per sample, drawn at random with a fixed seed.

    Returns:
        By layer ``[values, units]``, with one value per sample and position.
    """
    values: dict[str, list[Tensor]] = {}
    random = torch.Generator().manual_seed(0)

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            own = getattr(module, "pre_activation", None)
            z: Tensor = output if own is None else own(*arguments)
            z = z.movedim(unit_axis(module), 1).flatten(2) if z.ndim > 2 else z.unsqueeze(2)
            samples, units, places = z.shape
            chosen = torch.rand(samples, places, generator=random).argsort(dim=1)[:, :positions].to(z.device)
            picked = z.gather(2, chosen.unsqueeze(1).expand(-1, units, -1))  # a copy: later calls may overwrite z
            values.setdefault(name, []).append(picked.movedim(1, -1).flatten(0, 1))

        return after

    _watch(network, batches, [network.get_submodule(name).register_forward_hook(hook(name)) for name in names])
    return {name: torch.cat(parts) for name, parts in values.items()}


class Gaussianity(NamedTuple):
    """How far each unit's values are from a normal distribution; all 0 for a normal one.

    Shift and scale of the values do not matter. NaN for a constant unit.

    Attributes:
        skewness: Third central moment divided by the cubed standard deviation, ``[units]``.
        kurtosis: Excess kurtosis, fourth central moment divided by the squared variance, minus 3, ``[units]``; >= -2.
        distance: Kolmogorov-Smirnov distance, the largest difference between the values' distribution function and that
            of the normal with their mean and variance, ``[units]``, in [0, 1]. For n independent normal values its mean
            is .63 / sqrt(n), not 0.
    """

    skewness: Tensor
    kurtosis: Tensor
    distance: Tensor


def gaussianity(values: Tensor) -> Gaussianity:
    """Return skewness, excess kurtosis and distance to the normal of each unit's values, in double precision.

    Normalization Propagation rests on the claim that pre-activations are nearly normal.

    Args:
        values: ``[values, units]``.
    """
    parts = [torch.stack(_gaussianity(part.double())) for part in values.split(UNITS_AT_A_TIME, dim=1)]
    return Gaussianity(*torch.cat(parts, dim=1))


UNITS_AT_A_TIME = 64  # keeps the copies smaller than the values themselves


def _gaussianity(values: Tensor) -> Gaussianity:
    ordered = values.sort(dim=0).values
    variance, mean = torch.var_mean(ordered, dim=0, correction=0)
    std = variance.sqrt().masked_fill(ordered[0] == ordered[-1], torch.nan)  # rounding may leave a constant's above 0
    z = (ordered - mean) / std
    normal = torch.special.ndtr(z)
    ranks = torch.arange(len(z) + 1, dtype=z.dtype, device=z.device).unsqueeze(1) / len(z)
    distance = torch.maximum((ranks[1:] - normal).amax(dim=0), (normal - ranks[:-1]).amax(dim=0))
    square = z.square()
    return Gaussianity((square * z).mean(dim=0), square.square().mean(dim=0) - 3, distance)


# --- Jacobian of a layer; Proposition 1 (Normalization Propagation, sections 3.4 and 3.1) -----------------------------


def layer_jacobian(block: nn.Module, x: Tensor) -> Tensor:
    """Return the Jacobian of a block's output with respect to its input, at one sample.

    Args:
        block: Maps a batch to a batch, each sample separately (BatchNorm in evaluation mode).
        x: The sample, ``[features]`` or ``[C, H, W]``.

    Returns:
        ``[units, inputs]``. If the output has positions: the units at the middle position, and the inputs that they
        depend on (all other columns are 0).
    """
    with torch.no_grad():
        shape = block(x[None]).shape[1:]
    middle = tuple(side // 2 for side in shape[1:])
    copies = x.detach().expand(shape[0], *x.shape).clone().requires_grad_()  # one per unit, so one backward for all
    with torch.enable_grad():
        out = block(copies.clone())
        units = torch.arange(shape[0], device=out.device)
        (rows,) = torch.autograd.grad(out[(units, units, *middle)].sum(), copies)
    rows = rows.flatten(1)
    return rows[:, rows.any(dim=0)] if middle else rows


class Spectrum(NamedTuple):
    """The spectrum of a Jacobian ``[m, n]``.

    Attributes:
        singular: Its singular values, largest first, ``[min(m, n)]``.
        diagonal: The diagonal of J J^T, ``[m]``. NormProp's factor J aims at 1 for each unit (section 3.4).
    """

    singular: Tensor
    diagonal: Tensor


def spectrum(jacobian: Tensor) -> Spectrum:
    """Return singular values and the diagonal of J J^T, in double precision; NaN if an entry is not finite."""
    jacobian = jacobian.double()
    if not bool(torch.isfinite(jacobian).all()):
        return Spectrum(
            jacobian.new_full((min(jacobian.shape),), torch.nan), jacobian.new_full((len(jacobian),), torch.nan)
        )
    return Spectrum(torch.linalg.svdvals(jacobian), jacobian.square().sum(dim=1))


class Incoherence(NamedTuple):
    """Proposition 1 of Normalization Propagation for a weight matrix W ``[m, n]``, on white input of variance 1.

    The covariance of W x is Sigma = W W^T with diagonal alpha_i = ||W_i||^2. The proposition bounds the off-diagonal
    part by the coherence.

    **The printed bound is wrong.** It reads

        ||Sigma - diag(alpha)||_F <= sqrt(sum_i ||W_i||^2 (1 - ||W_i||^2)
                                          + sum_{i != j} m (m - 1) mu^2 ||W_i||^2 ||W_j||^2).

    Its proof has ||W_i||^2 in place of ||W_i||^4, so the diagonal does not cancel, and it multiplies the sum over
    pairs, which has m (m - 1) terms, by m (m - 1) once more. For orthogonal rows longer than 1 the root is imaginary;
    long rows with a small coherence exceed the bound; for orthogonal rows shorter than 1 it is positive although the
    left side is 0. Each off-diagonal entry is at most mu ||W_i|| ||W_j||, so

        ||Sigma - diag(alpha)||_F <= mu sqrt(sum_{i != j} ||W_i||^2 ||W_j||^2),

    with equality if all pairs of rows are equally coherent.

    Attributes:
        coherence: mu, the largest |cosine| between two rows.
        distance: ||Sigma - diag(alpha)||_F.
        printed: The printed bound; NaN if its root is imaginary.
        mended: The corrected bound.
    """

    coherence: Tensor
    distance: Tensor
    printed: Tensor
    mended: Tensor


def incoherence(weight: Tensor) -> Incoherence:
    """Return the coherence of a layer's rows or filters ``[m, ...]`` and both bounds, in double precision."""
    W = weight.detach().flatten(1).double()
    m = len(W)
    sigma = W @ W.T
    alpha = sigma.diagonal().clone()
    sigma.fill_diagonal_(0)
    lengths = alpha.sqrt()
    cosines = (sigma.abs() / torch.outer(lengths, lengths)).nan_to_num(nan=0.0)  # a zero row is coherent with none
    mu = cosines.max()
    pairs = alpha.sum().square() - alpha.square().sum()
    printed = (alpha * (1 - alpha)).sum() + m * (m - 1) * mu.square() * pairs
    return Incoherence(mu, sigma.norm(), printed.sqrt(), mu * pairs.clamp_min(0).sqrt())


def cosines_of_pairs(weight: Tensor) -> Tensor:
    """Return the m (m - 1) / 2 absolute cosines between a layer's rows or filters ``[m, ...]``, in double precision."""
    W = weight.detach().flatten(1).double()
    unit = (W / W.norm(dim=1, keepdim=True)).nan_to_num(nan=0.0)  # a zero row is coherent with none
    one, other = torch.triu_indices(len(W), len(W), offset=1, device=W.device)
    cosines: Tensor = (unit @ unit.T)[one, other].abs()
    return cosines


# --- Sharpness --------------------------------------------------------------------------------------------------------


def sharpness(network: nn.Module, losses: Sequence[Loss], *, products: int = 12, seed: int = 0) -> Tensor:
    """Return the largest eigenvalue of the loss's Hessian with respect to the weights, from Hessian-vector products.

    Uses the Lanczos method: the largest Rayleigh quotient in the space that power iteration spans. Power iteration
    itself ends 10 % too low if two eigenvalues are close, and at another eigenvalue if a negative one has a larger
    modulus.

    If the loss is given in parts, each product handles one part at a time, so no more than one part's graph is in
    memory (see `graph_bytes`). The graph of a single part is kept from product to product, which saves time.

    Args:
        network: The network, or a copy of it.
        losses: Each maps the network to a part of the loss, which is their sum.
        products: Number of Hessian-vector products; as many vectors of the size of all weights are kept.
        seed: Seed of the start vector, which has a generator of its own.

    Returns:
        A scalar, float64: up to rounding, a lower bound of the largest eigenvalue. NaN if a product is not finite.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    whole = _slope(network, losses[0], parameters) if len(losses) == 1 else None

    def product(vector: Tensor) -> Tensor:
        image = torch.zeros_like(vector)
        for loss in losses:
            slope = _slope(network, loss, parameters) if whole is None else whole
            columns = torch.autograd.grad(
                slope, parameters, vector, retain_graph=whole is not None, materialize_grads=True
            )
            image += torch.cat([column.reshape(-1) for column in columns])
        return image

    size = sum(p.numel() for p in parameters)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(parameters[0])
    basis = torch.zeros(0, size, dtype=vector.dtype, device=vector.device)
    images = basis
    for _ in range(min(products, size)):
        for _ in range(2):  # after a single orthogonalisation, rounding errors grow
            vector = vector - basis.T @ (basis @ vector)
        length = vector.norm()
        if basis.shape[0] and not length > torch.finfo(vector.dtype).eps * images[-1].norm():
            break  # the space is complete, or a value is not finite
        basis = torch.cat([basis, (vector / length).unsqueeze(0)])
        vector = product(basis[-1])
        images = torch.cat([images, vector.unsqueeze(0)])
    projected = (basis @ images.T).double()
    if not bool(torch.isfinite(projected).all()):
        return projected.new_tensor(torch.nan)
    largest: Tensor = torch.linalg.eigvalsh((projected + projected.T) / 2)[-1]
    return largest


def _slope(network: nn.Module, loss: Loss, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the flat gradient, differentiable."""
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss(network), parameters, create_graph=True, materialize_grads=True)
        return torch.cat([slope.reshape(-1) for slope in slopes])


def graph_bytes(network: nn.Module, loss: Loss) -> int:
    """Return the number of bytes that autograd keeps to differentiate a loss's gradient again, without the weights."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()  # the graph keeps it alive, so the address is unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _slope(network, loss, parameters)
    return sum(size for address, size in held.items() if address not in weights)
