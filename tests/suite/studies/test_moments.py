from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from tests.helpers.settings import MakeSetting

from backforward import NormPropLinear
from backforward.probes import layer_jacobian
from backforward_suite.errors import BadInput
from backforward_suite.studies import Findings, Moments, Setting
from backforward_suite.studies.moments import expected_relu_product

ACTIVATIONS = ("relu", "prelu", "gelu", "tanh")
SMALL = Moments(
    activations=ACTIVATIONS,
    samples=100_000,
    widths=(16, 200),
    depth=6,
    chain_inputs=300,
    jacobian_rows=1600,
    shapes=((2, 8), (6, 24)),
    covariance_inputs=2000,
    channels=32,
    images=60,
)


@pytest.fixture(scope="module")
def found(digits: Any) -> Findings:
    return SMALL(_setting(digits))


def _setting(digits: Any, seed: int = 0) -> Setting:
    def unused(*_: Any) -> Any:
        raise AssertionError("a study of layers trains nothing")

    def network(_: int, **changes: Any) -> torch.nn.Module:
        from backforward.data_norm import DataNorm

        return torch.nn.ModuleDict({"data_norm": DataNorm.fit("global", digits.train.x)})

    return Setting(seed, 8, digits, network, unused, unused)


@pytest.fixture(scope="module")
def table(found: Findings) -> pd.DataFrame:
    return pd.DataFrame(list(found.rows))


def values(table: pd.DataFrame, **where: Any) -> pd.Series:
    """The values of the rows with these columns, by the order in which they were found."""
    chosen = table
    for key, wanted in where.items():
        chosen = chosen[chosen[key] == wanted]
    assert len(chosen), where
    return chosen["value"]


class TestMoments:
    def test_three_ways_to_the_same_numbers(self, table: pd.DataFrame) -> None:
        for name in ACTIVATIONS:
            rows = table[(table["part"] == "moments") & (table["activation"] == name)]
            by_method = rows.pivot_table(index="quantity", columns="method", values="value")
            error = rows[rows["method"] == "monte_carlo"].set_index("quantity")["error"].sort_index()
            assert list(by_method.index) == ["jacobian", "mean", "std"]
            assert (by_method["library"] - by_method["quadrature"]).abs().max() < 1e-12
            assert ((by_method["library"] - by_method["monte_carlo"]).abs() < 5 * error).all()

    def test_standard_errors_are_those_of_the_sample(self, table: pd.DataFrame) -> None:
        """Of a mean: the standard deviation over the root of the sample's size."""
        rows = table[(table["part"] == "moments") & (table["method"] == "monte_carlo")]
        for name in ACTIVATIONS:
            of_it = rows[rows["activation"] == name].set_index("quantity")
            expected = of_it.loc["std", "value"] / math.sqrt(SMALL.samples)
            assert of_it.loc["mean", "error"] == pytest.approx(expected, rel=0.35)  # four sigma of 100 batches' spread


class TestChain:
    @pytest.mark.parametrize("factor", ["none", "paper", "exact"])
    def test_relu_follows_the_theory_of_wide_layers(self, table: pd.DataFrame, factor: str) -> None:
        """With input of second moment q, pre-activations are N(0, q / J^2) over units and inputs together."""
        mean, std = 1 / math.sqrt(2 * math.pi), math.sqrt((1 - 1 / math.pi) / 2)
        J = {"none": 1.0, "paper": 1.21, "exact": math.sqrt(0.5) / std}[factor]
        q = 1.0
        where = {"part": "chain", "activation": "relu", "jacobian_factor": factor, "width": 200}
        for layer in range(1, SMALL.depth + 1):
            r = math.sqrt(q) / J
            shift, spread = mean * (r - 1) / std, r
            q = shift**2 + spread**2
            assert values(table, quantity="mean", layer=layer, **where).item() == pytest.approx(shift, abs=0.03)
            assert values(table, quantity="std", layer=layer, **where).item() == pytest.approx(spread, abs=0.05)

    def test_a_units_own_spread_is_at_most_that_of_all(self, table: pd.DataFrame) -> None:
        together = values(table, part="chain", quantity="std").to_numpy()
        own = values(table, part="chain", quantity="unit_std").to_numpy()
        assert (own <= together + 1e-9).all()
        assert len(own) == len(SMALL.widths) * 9 * SMALL.depth


class TestJacobian:
    def test_relu_with_orthogonal_weights(self, table: pd.DataFrame) -> None:
        """G = diag(act') Q / (J std): its singular values are 0 and 1 / (J std), nothing between."""
        std = math.sqrt((1 - 1 / math.pi) / 2)
        where = {"part": "jacobian", "activation": "relu", "weights": "orthogonal", "width": 200}
        for factor, J in (("none", 1.0), ("paper", 1.21), ("exact", math.sqrt(0.5) / std)):
            found = {
                quantity: values(table, quantity=quantity, jacobian_factor=factor, **where).item()
                for quantity in ("singular_max", "singular_min", "diagonal", "off_diagonal", "eigenvalue_max")
            }
            assert found["singular_max"] == pytest.approx(1 / (J * std), rel=1e-5)
            assert found["singular_min"] == pytest.approx(0, abs=1e-6)
            assert found["off_diagonal"] == pytest.approx(0, abs=1e-6)
            assert found["diagonal"] == pytest.approx(0.5 / (J * std) ** 2, rel=0.1)
            assert found["eigenvalue_max"] <= found["singular_max"] ** 2 * (1 + 1e-6)

    def test_the_closed_form_is_what_samples_tend_to(self) -> None:
        layer = NormPropLinear(5, 6, activation="relu", jacobian_factor="paper")
        with torch.no_grad():
            layer.weight.copy_(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows = layer.weight.detach().double()
        rows /= rows.norm(dim=1, keepdim=True)
        passed = (x @ rows.T > 0).double()
        scale = 1.21 * math.sqrt((1 - 1 / math.pi) / 2)
        sampled = (passed.T @ passed / len(x)) * (rows @ rows.T) / scale**2
        assert torch.allclose(expected_relu_product(layer), sampled, atol=0.01)
        one = layer_jacobian(layer, x[0].float()).double()
        assert torch.allclose(one @ one.T, torch.outer(passed[0], passed[0]) * (rows @ rows.T) / scale**2, atol=1e-5)

    def test_orthogonal_rows_have_equal_eigenvalues_and_random_ones_do_not(self, table: pd.DataFrame) -> None:
        """However few inputs were sampled: the closed form has no sampling."""
        where = {"part": "jacobian", "activation": "relu", "jacobian_factor": "none", "width": 200}
        for weights, low, high in (("orthogonal", 1.4669, 1.4670), ("random", 0.6, 3.7)):
            for quantity in ("exact_eigenvalue_min", "exact_eigenvalue_max"):
                assert low <= values(table, quantity=quantity, weights=weights, **where).item() <= high
        spread = values(table, quantity="exact_eigenvalue_max", weights="random", **where).item()
        assert spread > 3

    def test_the_factor_divides_relus_jacobian(self, table: pd.DataFrame) -> None:
        for weights in ("random", "orthogonal"):
            where = {"part": "jacobian", "activation": "relu", "weights": weights, "width": 200, "quantity": "diagonal"}
            ratio = values(table, jacobian_factor="none", **where).item() / (
                values(table, jacobian_factor="paper", **where).item()
            )
            assert ratio == pytest.approx(1.21**2, rel=1e-5)

    def test_the_trace_is_the_sum_of_the_eigenvalues(self, table: pd.DataFrame) -> None:
        low, middle, high = (
            values(table, part="jacobian", quantity=quantity).to_numpy()
            for quantity in ("eigenvalue_min", "diagonal", "eigenvalue_max")
        )
        assert (low >= -1e-9).all()
        assert (low <= middle).all()
        assert (middle <= high).all()


class TestProposition1:
    def test_equally_coherent_rows_reach_the_mended_bound(self, table: pd.DataFrame) -> None:
        equal = table[(table["part"] == "proposition1") & (table["weights"] == "equal")]
        wide = equal.pivot_table(
            index=["rows", "length", "cosine"], columns="quantity", values="value", dropna=False
        ).reset_index()
        assert len(wide) == 2 * 3 * 2
        assert wide["distance"].to_numpy() == pytest.approx(wide["mended_bound"].to_numpy(), rel=1e-9)
        assert wide["coherence"].to_numpy() == pytest.approx(wide["cosine"].to_numpy(), rel=1e-9)
        # rows of length l at cosine c: l^2 c for each pair
        expected = wide["length"] ** 2 * wide["cosine"] * (wide["rows"] * (wide["rows"] - 1)) ** 0.5
        assert wide["distance"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)

    def test_orthogonal_rows(self, table: pd.DataFrame) -> None:
        where = {"part": "proposition1", "weights": "orthogonal"}
        assert values(table, quantity="distance", **where).max() < 1e-12
        assert values(table, quantity="printed_bound", length=2.0, **where).isna().all()  # imaginary
        assert (values(table, quantity="printed_bound", length=0.5, **where) > 0.1).all()  # though nothing is there

    def test_the_printed_bound_is_exceeded_where_it_is_known_to_be(self, table: pd.DataFrame) -> None:
        where = {"part": "proposition1", "rows": 2, "length": 2.0, "cosine": 0.7}
        distance, printed = (values(table, quantity=q, **where).item() for q in ("distance", "printed_bound"))
        assert distance == pytest.approx(0.7 * math.sqrt(2 * 16))
        assert printed == pytest.approx(math.sqrt(2 * 4 * (1 - 4) + 2 * 0.7**2 * 2 * 16))
        assert distance > printed

    def test_what_is_sampled_is_what_is_computed_but_for_chance(self, table: pd.DataFrame) -> None:
        distance, sampled = (
            values(table, part="proposition1", quantity=quantity).to_numpy()
            for quantity in ("distance", "sampled_distance")
        )
        error = table[table["quantity"] == "sampled_distance"]["error"].to_numpy()
        assert (abs(sampled - distance) < 3 * error).all()
        assert abs(sampled - distance).max() > 0

    def test_headlines_count_cases(self, found: Findings) -> None:
        assert found.final["proposition1/cases"] == 2 * 3 * 4
        assert found.final["proposition1/mended_exceeded"] == 0
        assert found.final["proposition1/printed_exceeded"] >= 1
        assert found.final["proposition1/printed_imaginary"] >= 2


class TestPooling:
    def test_white_input_after_single_pixel_filters(self, table: pd.DataFrame) -> None:
        """Positions are then independent: of 8 x 8, pooling sees 2 x 2, 2 x 3 or 3 x 3 of them, the rest is padding."""
        seen = [a * b for a in (2, 3, 3, 3) for b in (2, 3, 3, 3)]
        mean, std = 1 / math.sqrt(2 * math.pi), math.sqrt((1 - 1 / math.pi) / 2)
        t = torch.linspace(0, 8, 8001, dtype=torch.float64)
        cdf = torch.special.ndtr(t)
        largest = [(torch.trapezoid(1 - cdf**k, t).item() - mean) / std for k in seen]
        where = {"part": "pooling", "input": "white", "filter": 1, "jacobian_factor": "none"}
        for pooling, quantity, expected in (
            ("none", "mean", 0.0),
            ("none", "std", 1.0),
            ("average", "mean", 0.0),
            ("average", "std", math.sqrt(sum(seen) / len(seen)) / 9),
            ("max", "mean", sum(largest) / len(largest)),
        ):
            assert values(table, pooling=pooling, quantity=quantity, **where).item() == pytest.approx(
                expected, abs=0.05
            )

    def test_pre_activations_of_white_input_are_normal(self, table: pd.DataFrame) -> None:
        where = {"part": "gaussianity", "input": "white", "filter": 1, "jacobian_factor": "none"}
        assert values(table, quantity="kurtosis", **where).item() == pytest.approx(0, abs=0.1)
        assert values(table, quantity="distance", **where).item() < 0.03

    def test_data_are_data(self, table: pd.DataFrame) -> None:
        white, data = (values(table, part="pooling", input=source).to_numpy() for source in ("white", "data"))
        assert len(white) == len(data)
        assert (white != data).all()


def test_the_seed_alone_decides_all(found: Findings, digits: Any) -> None:
    tiny = Moments(
        activations=("tanh",),
        samples=1000,
        widths=(4,),
        depth=1,
        chain_inputs=3,
        jacobian_rows=1,
        shapes=((2, 4),),
        lengths=(1.0,),
        cosines=(),
        covariance_inputs=5,
        channels=2,
        images=3,
    )
    state = torch.get_rng_state()
    one, again, other = (tiny(_setting(digits, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.final == again.final
    assert pd.DataFrame(list(one.rows)).equals(pd.DataFrame(list(again.rows)))  # also where a bound is nan
    assert one.final != other.final
    assert all(math.isfinite(value) for value in one.final.values())


def test_bad_settings_are_refused(make_setting: MakeSetting) -> None:
    with pytest.raises(BadInput, match=r"study.images=5000: there are 1297 training images"):
        Moments(images=5000)(make_setting())
    for arguments, message in (
        ({"activations": ["relo"]}, "unknown activation 'relo'"),
        ({"activations": []}, r"study.activations: give at least one"),
        ({"depth": 0}, r"study.depth=0: must be an integer >= 1"),
        ({"widths": [0]}, r"study.widths=0: must be an integer >= 1"),
        ({"samples": 1050}, r"study.samples=1050: give a multiple of 100"),
        ({"samples": 100}, r"study.samples=100: give a multiple of 100, 1000 at least"),
        ({"shapes": [[8, 4]]}, r"study.shapes: \[8, 4\] is not"),
        ({"lengths": [-1.0]}, r"study.lengths"),
        ({"cosines": [1.0]}, r"study.cosines"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments(**arguments)  # type: ignore[arg-type]
