from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.docstrings import table_of
from tests.oracles.normprop import literal
from torch import Tensor, nn

from backforward.data_norm import DataNorm
from backforward.moments import ACTIVATIONS, gaussian_moments
from backforward.normprop import (
    NormPropConv2d,
    NormPropLinear,
    StandardizedActivation,
    project_unit_norm_,
    unit_norm_projection,
)

Layer = NormPropLinear | NormPropConv2d


def smooth_abs(z: Tensor) -> Tensor:
    """A callable without a module in PyTorch."""
    return (z.square() + 0.01).sqrt()


# --- The layers against the printed formula --------------------------------------------------------------------------


def linear(activation: object, dtype: torch.dtype, **settings: object) -> tuple[Layer, Tensor]:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    layer = NormPropLinear(24, 32, activation=activation, dtype=dtype, **settings)
    return randomise(layer, generator), torch.randn(200, 24, generator=generator, dtype=dtype)


def conv(activation: object, dtype: torch.dtype, **settings: object) -> tuple[Layer, Tensor]:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    layer = NormPropConv2d(6, 8, 3, activation=activation, dtype=dtype, **settings)
    return randomise(layer, generator), torch.randn(8, 6, 11, 10, generator=generator, dtype=dtype)


def randomise(layer: Layer, generator: torch.Generator) -> Layer:
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 + 0.2 * noise if parameter is layer.slope else parameter + 0.3 * noise)
    return layer


def act_of(layer: Layer) -> Callable[[Tensor], Tensor]:
    return (lambda u: layer.activation(u.clone())) if layer.slope is None else (lambda u: F.prelu(u, layer.slope))


CASES = [
    *((f"linear-{name}", linear, name, {}) for name in ACTIVATIONS),
    *((f"conv-{name}", conv, name, {}) for name in ACTIVATIONS),
    ("linear-callable", linear, smooth_abs, {}),
    ("conv-callable", conv, smooth_abs, {}),
    ("conv-stride-padding", conv, "relu", {"stride": (2, 1), "padding": 1}),
    ("conv-same-dilation", conv, "relu", {"padding": "same", "dilation": 2}),
    ("conv-groups", conv, "leaky_relu", {"groups": 2, "padding": (0, 1)}),
    ("prelu-per-channel", conv, nn.PReLU(8), {}),
    ("prelu-per-unit", linear, nn.PReLU(32), {}),
    ("relu-in-place", conv, nn.ReLU(inplace=True), {}),
    ("leaky-in-place", linear, nn.LeakyReLU(0.2, inplace=True), {}),
    ("elu-in-place", conv, nn.ELU(0.5, inplace=True), {}),
    ("silu-in-place", linear, nn.SiLU(inplace=True), {}),
    ("J-none", linear, "relu", {"jacobian_factor": "none"}),
    ("J-paper", conv, "relu", {"jacobian_factor": "paper"}),
    ("J-number", conv, "gelu", {"jacobian_factor": 0.7}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("make", "activation", "settings"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_folded_equals_the_formula(make: Callable[..., tuple[Layer, Tensor]], activation: object, settings, dtype):
    layer, x = make(activation, dtype, **settings)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    x.requires_grad_()
    arguments: list[Tensor] = []

    def act(u: Tensor) -> Tensor:
        arguments.append(u)
        return act_of(layer)(u)

    expected, got = literal(layer, x, act), layer(x)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()

    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    if dtype == torch.float32:
        upstream[arguments[0].abs() < 1e-5] = 0  # at the kink, a rounding error decides whether there is a gradient
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,), (2, 4, 5, 5), (4, 5, 5)], ids=str)
def test_gradcheck(activation: str, shape: tuple[int, ...]):
    """With more dimensions, or without a batch, the clamp works on a view."""
    torch.manual_seed(0)
    images = shape[-1] == 5
    layer: Layer
    if images:
        layer = NormPropConv2d(4, 3, 2, stride=2, padding=1, activation=activation, dtype=torch.float64)
    else:
        layer = NormPropLinear(4, 3, activation=activation, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
    if len(shape) in (2, 4):
        assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 2, "dilation": 2, "groups": 3}, {"padding": "same"}])
def test_has_the_shapes_of_conv2d(settings: dict[str, object]):
    x = torch.randn(2, 6, 9, 8)
    plain = nn.Conv2d(6, 9, (3, 5), **settings)
    layer = NormPropConv2d(6, 9, (3, 5), **settings)
    assert layer(x).shape == plain(x).shape
    assert layer.weight.shape == plain.weight.shape


@pytest.mark.parametrize("make", [linear, conv])
def test_scaling_the_weights_changes_nothing(make: Callable[..., tuple[Layer, Tensor]]):
    layer, x = make("relu", torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight *= torch.linspace(0.01, 100, len(layer.weight), dtype=torch.float64).view(layer._unit_shape)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    along = (gradient * layer.weight).flatten(1).sum(1)
    assert along.abs().max() <= 1e-12 * (gradient.flatten(1).norm(dim=1) * layer.weight.flatten(1).norm(dim=1)).max()


@pytest.mark.parametrize("make", [linear, conv])
def test_output_does_not_depend_on_the_other_samples(make: Callable[..., tuple[Layer, Tensor]]):
    layer, x = make("relu", torch.float32)
    together = layer(x)
    assert (layer(x[:1]) - together[:1]).abs().max() <= 1e-6 * together.abs().max()


def test_memory_layout_is_kept():
    layer, x = conv("relu", torch.float32)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    got = layer(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


# --- Mean and variance of the output ----------------------------------------------------------------------------------


def deep_moments(
    orthonormal: bool, jacobian_factor: str, samples: int, width: int = 1024, depth: int = 12
) -> tuple[Tensor, Tensor]:
    """Return mean and std of each unit at each layer, ``[depth, width]``, for input N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    layers = [NormPropLinear(width, width, jacobian_factor=jacobian_factor) for _ in range(depth)]
    for layer in layers:
        rows = torch.randn(width, width, generator=generator)
        layer.weight.detach().copy_(torch.linalg.qr(rows).Q if orthonormal else rows)
    total = torch.zeros(depth, width, dtype=torch.float64)
    squares = torch.zeros_like(total)
    chunk = 2500
    with torch.no_grad():
        for _ in range(samples // chunk):
            x = torch.randn(chunk, width, generator=generator)
            for i, layer in enumerate(layers):
                x = layer(x)
                total[i] += x.sum(0)
                squares[i] += x.square().sum(0)
    mean = total / samples
    return mean, (squares / samples - mean.square()).sqrt()


def pooled_std(mean: Tensor, std: Tensor) -> Tensor:
    """Return the standard deviation over samples and units from each unit's mean and std."""
    return ((mean.square() + std.square()).mean() - mean.mean().square()).sqrt()


def test_twelve_layers_keep_every_unit_standard():
    """With J = 1 and orthonormal rows, each of 12 x 1024 units is within .05 and .1 of mean 0 and std 1."""
    mean, std = deep_moments(orthonormal=True, jacobian_factor="none", samples=20_000)
    assert mean.abs().max() < 0.05
    assert (std - 1).abs().max() < 0.1


def test_twelve_layers_with_gaussian_rows_stay_standard_over_all_units():
    mean, std = deep_moments(orthonormal=False, jacobian_factor="none", samples=2_500)
    for m, s in zip(mean, std, strict=True):
        assert abs(m.mean()) < 0.05
        assert abs(pooled_std(m, s) - 1) < 0.1


def test_with_the_jacobian_factor_the_distribution_drifts():
    """J divides the activation's argument, so the output's std is no longer 1 but .83 after one layer."""
    mean, std = deep_moments(orthonormal=False, jacobian_factor="exact", samples=2_500)
    assert (mean[0].mean(), pooled_std(mean[0], std[0])) == (
        pytest.approx(-0.12, abs=0.01),
        pytest.approx(0.83, abs=0.01),
    )
    assert (mean[-1].mean(), pooled_std(mean[-1], std[-1])) == (
        pytest.approx(-0.35, abs=0.03),
        pytest.approx(0.49, abs=0.03),
    )


@pytest.mark.parametrize("name", [*ACTIVATIONS])
def test_mean_squared_singular_value_of_the_jacobian(name: str):
    """||J||_F^2 / m at input N(0, 1) is 1 for ReLU, LeakyReLU and PReLU, and gaussian_moments' value for others."""
    torch.manual_seed(0)
    rows = table_of(gaussian_moments)
    *_, without, reached = (float(v) for v in rows.get(name, ["1", "1"]))
    for factor, expected in (("none", without), ("exact", reached)):
        layer = NormPropLinear(512, 512, activation=name, jacobian_factor=factor)
        layer.weight.detach().copy_(torch.linalg.qr(torch.randn(512, 512)).Q)
        jacobians = torch.stack([torch.func.jacrev(layer)(sample) for sample in torch.randn(16, 1, 512)])
        assert (jacobians.square().sum() / (16 * 512)).item() == pytest.approx(expected, abs=0.03)


def test_standardized_activation_has_unit_variance():
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for name in ACTIVATIONS:
        out = StandardizedActivation(name)(z)
        assert abs(out.mean()) < 0.01
        assert abs(out.std() - 1) < 0.01


def test_batch_size_one_trains():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 1, 4, 4), dtype=torch.uint8)
    network = nn.Sequential(DataNorm.fit("global", images), nn.Flatten(), NormPropLinear(16, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y = torch.rand(1, 1, 4, 4), torch.tensor([1])
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# --- PyTorch's own tools ----------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        NormPropConv2d(3, 8, 3, padding=1),
        NormPropConv2d(8, 8, 3, activation="prelu"),
        NormPropConv2d(8, 8, 3, activation="tanh"),
        nn.Flatten(),
        NormPropLinear(128, 16, activation="leaky_relu"),
        NormPropLinear(16, 4, activation="identity", jacobian_factor="none", project=False),
    )


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "fx": torch.fx.symbolic_trace,
    "pickled fx": lambda net: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(net))),
    "compile": lambda net: torch.compile(net, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch.compile
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same(how: str):
    net = network()
    x = torch.randn(2, 3, 8, 8)
    other = COPIES[how](net)
    assert torch.equal(other(x), net(x))
    other(x).sum().backward()
    net(x).sum().backward()
    ours = {name.removeprefix("_orig_mod."): p.grad for name, p in other.named_parameters()}
    assert all(torch.equal(ours.pop(name), p.grad) for name, p in net.named_parameters())
    assert not ours


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is not supported in Python 3.14:DeprecationWarning")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_deployed_network_computes_the_same_for_any_batch_size(how: str, tmp_path: Path):
    net = network().eval()
    x = torch.randn(2, 3, 8, 8)
    if how == "trace":
        torch.jit.save(torch.jit.trace(net, x), tmp_path / "net.pt")
        deployed = torch.jit.load(tmp_path / "net.pt")
    else:
        any_size = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.export.save(torch.export.export(net, (x,), dynamic_shapes=any_size), tmp_path / "net.pt2")
        deployed = torch.export.load(tmp_path / "net.pt2").module()
    for samples in (2, 5):
        x = torch.randn(samples, 3, 8, 8)
        torch.testing.assert_close(deployed(x), net(x), rtol=1e-6, atol=1e-6)


def test_torch_func_gives_gradients_per_sample():
    net = network()
    x = torch.randn(3, 3, 8, 8)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.autograd.grad(net(x).square().sum(), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), gradient, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_trains_near_fp32():
    net = network()
    x = torch.randn(16, 3, 8, 8)
    expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    got = torch.autograd.grad(out.float().square().mean(), list(net.parameters()))
    assert out.dtype == torch.bfloat16
    cosine = F.cosine_similarity(
        torch.cat([g.flatten() for g in got]), torch.cat([e.flatten() for e in expected]), dim=0
    )
    assert cosine > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_clamped_outputs_get_no_gradient_in_any_precision(dtype: torch.dtype):
    """Backward selects outputs above the floor, and fp16 may round the floor up."""
    layer = NormPropLinear(4, 4).to(dtype)
    layer.beta.detach().fill_(-100)
    (gradient,) = torch.autograd.grad(layer(torch.randn(5, 4, dtype=dtype)).sum(), layer.beta)
    assert not gradient.any()


# --- Projection -------------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).norm(dim=1)


def test_projection_leaves_the_function_and_the_last_layer_alone():
    net = network().append(nn.Linear(4, 2))
    x = torch.randn(2, 3, 8, 8)
    before, last = net(x), [net[-2].weight.clone(), net[-1].weight.clone()]
    project_unit_norm_(net)
    for i in (0, 1, 2, 4):
        torch.testing.assert_close(row_norms(net[i].weight), torch.ones(len(net[i].weight)))
    assert torch.equal(net[-2].weight, last[0])
    assert torch.equal(net[-1].weight, last[1])
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_hook_projects_only_the_group_just_updated():
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    before = copy.deepcopy(net.state_dict())
    unit_norm_projection(net)([*net[1].parameters(), *net[5].parameters()])
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight"}
    torch.testing.assert_close(row_norms(net[1].weight), torch.ones(8))


def test_projection_accepts_tensors_and_keeps_zero_rows():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    other = torch.randn(3, 2, 3, 3)
    project_unit_norm_([weight, other])
    assert torch.equal(weight, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(row_norms(other), torch.ones(3))


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormPropLinear(2, 2, activation="rellu"), "unknown activation 'rellu': there are relu, leaky_relu, "),
        (
            lambda: NormPropLinear(2, 2, jacobian_factor="on"),
            "unknown jacobian_factor 'on': there are none, paper, exact",
        ),
        (lambda: NormPropConv2d(2, 2, 1, jacobian_factor=0), "unknown jacobian_factor 0: there are none, paper, exact"),
        (lambda: NormPropConv2d(3, 4, 1, groups=2), "groups=2 must divide in_channels=3 and out_channels=4"),
        (lambda: NormPropLinear(2, 2, activation=nn.Linear(2, 2)), "of the activations with parameters only PReLU"),
    ],
)
def test_refuses_bad_arguments_in_one_line(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match="^" + message) as error:
        call()
    assert "\n" not in str(error.value)
