from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.docstrings import table_of
from tests.oracles.normprop import monte_carlo_moments
from torch import Tensor, nn

from backforward.moments import ACTIVATIONS, ActivationMoments, gaussian_moments, make_activation


def smooth_abs(z: Tensor) -> Tensor:
    """A callable without a module in PyTorch."""
    return (z.square() + 0.01).sqrt()


def numbers(activation: Callable[[Tensor], Tensor] | str) -> list[float]:
    with torch.no_grad():
        return [float(moment) for moment in gaussian_moments(activation)]


@pytest.mark.parametrize("name", [*ACTIVATIONS, "smooth_abs"])
def test_moments_are_within_5_standard_errors_of_ten_million_draws(name: str):
    act = smooth_abs if name == "smooth_abs" else make_activation(name)
    mean, std, jacobian = numbers(act)
    drawn = monte_carlo_moments(act.double() if isinstance(act, nn.Module) else act, draws=10_000_000, seed=0)
    for ours, (theirs, error) in zip((mean, std, (jacobian * std) ** 2), drawn.values(), strict=True):
        assert abs(ours - theirs) <= 5 * error + 1e-12


@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "prelu", "elu", "selu", "gelu"])
def test_closed_forms_equal_the_quadrature(name: str):
    act = make_activation(name)
    act = act.double() if isinstance(act, nn.Module) else act
    by_quadrature = gaussian_moments(act.forward)
    assert numbers(act) == pytest.approx(list(by_quadrature), abs=1e-13)


def test_relu_as_in_the_paper():
    """Section 3.3 and 3.4."""
    expected = (math.sqrt(1 / (2 * math.pi)), math.sqrt((1 - 1 / math.pi) / 2), 1.2112)
    assert gaussian_moments("relu") == pytest.approx(expected, abs=5e-5)
    assert gaussian_moments(F.relu) == gaussian_moments(torch.relu) == gaussian_moments(nn.ReLU())


def test_docstring_table_holds():
    """The mean squared singular value with J is E[act'(z / J)^2] / (J std)^2."""
    rows = table_of(gaussian_moments)
    for name in ACTIVATIONS.keys() - {"identity"}:
        act = make_activation(name)
        act = act.double() if isinstance(act, nn.Module) else act
        mean, std, jacobian = numbers(act)
        shrunk = gaussian_moments(lambda z, act=act, jacobian=jacobian: act(z / jacobian))
        reached = (shrunk.jacobian * shrunk.std / std) ** 2
        assert [float(v) for v in rows[name]] == pytest.approx([mean, std, jacobian, jacobian**2, reached], abs=6e-4)


@pytest.mark.parametrize("moment", ActivationMoments._fields)
def test_prelu_moments_are_differentiable_in_the_slope(moment: str):
    def of_slope(slope: Tensor) -> Tensor:
        act = nn.PReLU(4, dtype=torch.float64)
        del act.weight
        act.weight = slope
        return getattr(gaussian_moments(act), moment)

    slopes = torch.tensor([-0.5, 0.0, 0.25, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_slope, slopes)


def test_kinks_of_a_callable_can_be_given():
    def soft_threshold(z: Tensor) -> Tensor:
        return F.softshrink(z, 0.3)

    upper = math.erfc(0.3 / math.sqrt(2)) / 2
    density = math.exp(-0.045) / math.sqrt(2 * math.pi)
    std = math.sqrt(2 * ((1 + 0.09) * upper - 0.3 * density))
    assert gaussian_moments(soft_threshold, kinks=(-0.3, 0.3)).std == pytest.approx(std, abs=1e-13)
    assert abs(gaussian_moments(soft_threshold).std - std) > 1e-8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_moments("rellu"), "unknown activation 'rellu': there are relu, leaky_relu, "),
        (lambda: gaussian_moments(lambda z: z * 0 + 1), "an activation that is constant"),
    ],
)
def test_refuses_bad_arguments_in_one_line(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match="^" + message) as error:
        call()
    assert "\n" not in str(error.value)
