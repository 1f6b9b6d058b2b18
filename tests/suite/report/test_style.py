from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from backforward_suite.report import style
from backforward_suite.report.finding import Estimate

RULES = ("sgd", "bfp", "bfp_poster", "sgd_2lr", "sgd_repeat", "bfp_warmup", "bfp_finetune")
NORMS = ("none", "batch", "prop")


@pytest.mark.parametrize("arms", [RULES, NORMS, tuple("abcdef")], ids=["rules", "norms", "strangers"])
def test_arms_are_distinct_in_grey(arms: tuple[str, ...]) -> None:
    looks = style.looks(arms).values()
    assert len({look.marker for look in looks}) == len(arms)
    for one, other in combinations(looks, 2):
        assert (one.marker, one.dash) != (other.marker, other.dash)


def test_rules_with_norms_are_distinct() -> None:
    looks = [style.look(f"{rule} + {norm}") for rule in ("sgd", "bfp") for norm in NORMS]
    assert len({(look.colour, look.dash) for look in looks}) == len(looks)
    assert len({look.marker for look in looks}) == len(looks)  # as single points, in grey


@pytest.mark.parametrize("count", [1, 4, 7])
def test_ordered_values_go_from_dark_to_light(count: int) -> None:
    looks = style.sequence(list(range(count)), "batch {}")
    shades = [np.dot(to_rgb(look.colour), (0.299, 0.587, 0.114)) for look in looks.values()]
    assert shades == sorted(shades)
    assert looks[0].label == "batch 0"
    assert len({(look.marker, look.dash) for look in looks.values()}) == count


def test_an_arm_looks_the_same_in_every_figure() -> None:
    for arms in (["bfp", "sgd"], ["stranger", "sgd", "bfp"], list(RULES)):
        assert style.looks(arms)["bfp"] == style.LOOKS["bfp"]
    assert style.looks(["x", "y"])["y"].label == "y"
    assert style.looks(["bfp"], {"bfp": "ours"})["bfp"].label == "ours"
    assert style.look("bfp + prop").colour == style.LOOKS["prop"].colour


def drawing(value: float | None = 0.5) -> tuple[bytes, bytes]:
    with style.applied():
        figure, axes = style.canvas(2, 2)
        look = style.look("bfp")
        frame = pd.DataFrame({"value": [1.0, 0.5], "low": [0.9, np.nan], "high": [1.1, np.nan]}, index=[1, 2])
        style.band(axes[0, 0], look, frame)
        style.band(axes[0, 0], look, frame.iloc[:0])
        estimates = [Estimate(value, None, None, 1), None, Estimate(0.3, 0.2, 0.4, 5)]
        style.points(axes[0, 1], look, [0.01, 0.1, 1], estimates)
        style.at_values(axes[0, 1], [0.01, 0.1, 1])
        style.forest(axes[1, 0], list(zip("abc", estimates, strict=True)), look, tolerance=0.1)
        style.mark_published(axes[1, 1], 0.5, "published")
        style.legend(figure)
        style.stamp(figure, "scale small")
        return style.encode(figure, "svg"), style.encode(figure, "png")


def test_the_same_figure_gives_the_same_bytes() -> None:
    svg, png = drawing()
    assert (svg, png) == drawing()
    assert b"<dc:date>" not in svg
    assert b"matplotlib" not in png[:200].lower()
    assert drawing(0.6)[0] != svg


def test_missing_values_are_left_out_or_marked() -> None:
    svg, _ = drawing(None)
    assert b"<!-- not measured -->" in svg


def test_a_legend_takes_as_many_columns_as_fit_and_says_each_label_once() -> None:
    with style.applied():
        figure, axes = style.canvas(1, 2)
        for panel in axes[0]:
            for rule in RULES:
                panel.plot([0, 1], [0, 1], label=style.look(rule).label)
        style.legend(figure)
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [style.look(rule).label for rule in RULES]
        assert legend.get_window_extent().width <= figure.bbox.width


def test_the_stamp_is_below_the_panels() -> None:
    with style.applied():
        figure, axes = style.canvas()
        axes[0, 0].set_xlabel("epoch")
        style.stamp(figure, "scale small")
        figure.draw_without_rendering()
        [text] = figure.texts
        assert text.get_window_extent().y1 <= axes[0, 0].get_tightbbox().y0
