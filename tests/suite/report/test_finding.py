from __future__ import annotations

import math

import pytest

from backforward_suite.report.finding import Estimate


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.9431, 0.9112, 0.9751, 5), "0.943 [0.911, 0.975]"),
        (Estimate(98.123, 97.5, 98.7, 5, unit="%"), "98.1 [97.5, 98.7] %"),
        (Estimate(-0.26, -2.72, 4.91, 5, unit="points"), "-0.3 [-2.7, 4.9] points"),
        (Estimate(1.15, 0.07, 17.4, 2), "1.1 [0.07, 17]"),
        (Estimate(0.00055, 0.0002, 1.62, 50, "quantile"), "0.00055 [0.0002, 1.6]"),
        (Estimate(3.0, 2.0, None, 50, "quantile"), "3 [2, ?]"),
        (Estimate(0.5, None, None, 1), "0.500"),
        (Estimate(1.0, 1.0, 1.0, 5), "1.000 [1.000, 1.000]"),
        (Estimate(0.0, 0.0, 0.0, 5), "0.000 [0.000, 0.000]"),
        (Estimate(2e-8, 1e-8, 3e-8, 5), "2.00e-08 [1.00e-08, 3.00e-08]"),
        (Estimate(None, None, None, 0), "-"),
    ],
)
def test_an_estimate_is_written_with_the_digits_that_its_interval_leaves(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


def test_an_estimate_is_finite() -> None:
    with pytest.raises(ValueError, match="finite or None, not inf"):
        Estimate(1.0, 0.0, math.inf, 3)
