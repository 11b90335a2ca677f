"""What stands in the figures, read from their artists."""

import math
import subprocess
import sys

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from harmonize.reports.figures import depth_figure, depth_names, depth_points, epoch_sheet, surface_figure
from harmonize.reports.pictures import KINDS, draw
from harmonize.reports.references import references_for
from harmonize.reports.style import PALETTE, to_png, to_svg
from harmonize.types import Curve, Findings, Picture
from tests.reports.synthetic import findings, make_pictures, quantity, spec


def labels(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines(axes, color=None, style=None) -> list:
    """Lines with data, of one colour and line style."""
    return [
        line
        for line in axes.lines
        if len(line.get_xdata())
        and (color is None or to_rgba(line.get_color()) == to_rgba(color))
        and (style is None or line.get_linestyle() == style)
    ]


def one(value, error=None, layer=None, **options) -> Findings:
    layer = layer or list(range(1, len(value) + 1))
    return Findings({"x": Curve(quantity("X", "px"), layer, value, error or [0.0] * len(value), **options)})


def test_a_network_is_a_line_with_a_band_of_one_standard_error():
    figure = depth_figure("x", {"a": one([1.0, 3.0, 2.0], [0.1, 0.2, 0.3])})
    (axes,) = figure.axes
    (line,) = lines(axes, PALETTE[0], "-")
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [1, 3, 2]
    (band,) = axes.collections
    corners = {(round(float(x)), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert {(1, 0.9), (1, 1.1), (2, 2.8), (2, 3.2), (3, 1.7), (3, 2.3)} <= corners
    assert axes.get_ylabel() == "X (px)"
    assert labels(figure) == ["a"]


def test_what_it_is_drawn_against():
    networks = {"a": one([1.0, 2.0], uniform=[5.0, 5.0])}
    figure = depth_figure("x", networks, {"a": one([0.5, 0.6])})
    (axes,) = figure.axes
    (dashed,) = lines(axes, style="--")
    assert dashed.get_ydata().tolist() == [5, 5]
    (dotted,) = lines(axes, style=":")
    assert dotted.get_ydata().tolist() == [0.5, 0.6]
    assert labels(figure) == ["a", "untrained", "uniform attention"]


def test_uniform_lines_that_differ_have_the_networks_colours():
    networks = {"a": one([1.0], uniform=[5.0]), "b": one([1.0], uniform=[6.0])}
    dashed = lines(depth_figure("x", networks).axes[0], style="--")
    assert [(line.get_ydata()[0], line.get_color()) for line in dashed] == [(5, PALETTE[0]), (6, PALETTE[1])]


def test_heads_are_dots_when_there_is_one_network():
    heads = {"heads": [[1.0, 2.0], [3.0, math.nan]], "head_errors": [[0.1] * 2] * 2}
    assert "single heads" in labels(depth_figure("x", {"a": one([1.5, 3.0], **heads)}))
    assert "single heads" not in labels(depth_figure("x", {"a": one([1.5, 3.0], **heads), "b": one([1.0])}))


def test_networks_beyond_the_palette_still_differ():
    networks = {str(k): one([1.0, float(k)]) for k in range(2 * len(PALETTE))}
    (axes,) = depth_figure("x", networks).axes
    assert len({line.get_color() for line in lines(axes, style="-")}) == len(networks)


def test_references_are_grey_and_name_their_source():
    found = {"a": findings(pictures=False)}
    figure = depth_figure("fourier", found, references=references_for("fourier", spec()))
    grey = lines(figure.axes[0], "#8c8c8c")
    assert [line.get_ydata()[0] for line in grey] == [-2.905, -1.999, -3.06]
    assert sum("[POSTER-" in label for label in labels(figure)) == 3


def test_the_half_block_after_self_attention_stands_between_the_blocks():
    found = findings(depth=3, pictures=False)
    names = depth_names([found])
    assert {"fourier", "fourier_mean_free", "fourier_radial", "depth_similarity_attention", "prefix_attention"} <= {
        *names
    }
    assert not {"fourier_attention", "fourier_mean_free_attention", "fourier_radial_attention"} & {*names}
    points = depth_points(found, "fourier")
    assert [x for x, _, _ in points] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert points[1][1] == found.curves["fourier_attention"].value[0]
    assert points[2][1] == found.curves["fourier"].value[1]
    figure = depth_figure("fourier", {"a": found})
    assert len(figure.axes) == 1
    (line,) = lines(figure.axes[0], PALETTE[0], "-")
    assert line.get_xdata().tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_curves_without_a_finite_value_are_left_out():
    nothing = one([math.nan, math.inf])
    assert depth_names([nothing]) == []
    assert depth_names([nothing, one([1.0, 2.0])]) == ["x"]
    figure = depth_figure("x", {"a": nothing, "b": one([1.0, 2.0])})
    assert labels(figure) == ["b"]
    assert lines(figure.axes[0], PALETTE[1], "-"), "b keeps its colour"


def test_a_gap_where_a_value_is_not_finite():
    (line,) = lines(depth_figure("x", {"a": one([1.0, math.inf, 2.0], [0.1, math.nan, 0.1])}).axes[0], style="-")
    assert math.isnan(line.get_ydata()[1])


def test_the_legend_hides_nothing():
    figure = depth_figure("x", {"a network": one([1.0, 2.0]), "another network": one([2.0, 1.0])})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    below = figure.axes[0].get_tightbbox().y0
    assert legend.get_window_extent().y0 >= 0
    assert legend.get_window_extent().y1 <= below


def test_the_sheet_of_an_epoch():
    found = findings(depth=4, num_heads=2, pictures=False)
    found.curves["nothing"] = one([math.nan] * 4).curves["x"]
    previous = {e: findings(depth=4, num_heads=2, seed=e, pictures=False) for e in [*range(20), 25]}
    figure = epoch_sheet(found, findings(depth=4, pictures=False), previous, 20, spec(depth=4))
    assert len(figure.axes) == len(depth_names([found])) == 23
    epochs = [label for label in labels(figure) if label.startswith("epoch")]
    assert epochs == [f"epoch {e}" for e in (0, 3, 5, 8, 11, 14, 16, 19)] + ["epoch 20"]
    assert {"untrained", "uniform attention"} <= {*labels(figure)}
    assert to_png(figure, dpi=30).startswith(b"\x89PNG")


def test_the_sheet_of_a_first_epoch_with_nothing_to_show():
    figure = epoch_sheet(Findings(), None, {}, 0, spec())
    assert figure.axes == []
    assert to_png(figure, dpi=30)


def test_a_spectrum_is_a_line_per_layer_coloured_by_depth():
    found = findings(depth=3, pictures=False)
    surface = found.surfaces["fourier_spectrum"]
    axes, bar = surface_figure("fourier_spectrum", {"a": surface}).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == surface.value
    assert len({line.get_color() for line in axes.lines}) == 7
    assert axes.get_xlabel() == "frequency / π"
    assert bar.get_ylabel() == "block"


def test_cka_is_a_heat_map_per_network():
    found, other = findings(depth=3, pictures=False), findings(depth=5, pictures=False)
    figure = surface_figure("cka", {"a": found.surfaces["cka"], "b": other.surfaces["cka"]})
    first, second, _ = figure.axes
    assert first.images[0].get_array().tolist() == found.surfaces["cka"].value
    assert second.images[0].get_array().shape == (6, 6)
    assert (first.get_title(), second.get_title()) == ("a", "b")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 5])
def test_every_kind_of_picture_draws(kind, depth):
    picture = make_pictures(depth)[kind]
    figure = draw(picture)
    shown = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert [*dict.fromkeys(shown)] == [f"block {layer}" for layer in dict.fromkeys(picture.arrays["layers"].tolist())]
    assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_a_kind_that_does_not_exist():
    with pytest.raises(ValueError, match=r"picture\.kind='paint': one of attention_maps, "):
        draw(Picture(quantity("X"), "paint", {}))


@pytest.mark.parametrize(("height", "width", "rows", "cols"), [(224, 224, 14, 14), (96, 64, 6, 8)])
def test_the_marker_lies_exactly_on_its_patch(height, width, rows, cols):
    queries = torch.tensor([[0, 0], [rows - 1, 2]])
    image = torch.zeros(height, width, 3)
    arrays = {"image": image, "maps": torch.rand(2, 2, rows, cols), "queries": queries, "layers": torch.tensor([3, 7])}
    figure = draw(Picture(quantity("X"), "attention_maps", arrays))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * (1 + 2)
    for i, axes in enumerate(panels):
        (rectangle,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        row, col = queries[i // 3].tolist()
        # A panel's pixels (or cells) of the query's patch, from their upper left corner to the lower right one.
        high, wide = (height / rows, width / cols) if i % 3 == 0 else (1, 1)
        assert rectangle.get_xy() == (col * wide - 0.5, row * high - 0.5)
        assert (rectangle.get_height(), rectangle.get_width()) == (high, wide)
        left, right, bottom, top = axes.images[0].get_extent()
        assert left <= rectangle.get_x()
        assert rectangle.get_x() + wide <= right
        assert top <= rectangle.get_y()
        assert rectangle.get_y() + high <= bottom


def test_the_same_figure_is_the_same_file():
    first, second = (to_svg(depth_figure("x", {"a": one([1.0, 2.0])})) for _ in range(2))
    assert first == second


def test_pyplot_is_never_loaded():
    """It would keep every figure alive, and choose a window system on a machine that has one."""
    code = "import sys, harmonize.reports.html; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
