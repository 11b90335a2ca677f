"""Results as files and as a figure: every row is in them, with its error, whatever its names."""

import csv
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.colors import to_rgba

from harmonize.reports.evaluation import COLUMNS, LABEL_LETTERS, result_figure, write_results
from harmonize.reports.style import PALETTE, to_png


def row(network="A", metric="top1", value=0.5, **columns):
    empty = dict.fromkeys(COLUMNS) | {"series": "", "axis": "", "note": "", "published_source": ""}
    return empty | {"protocol": "p", "network": network, "metric": metric, "value": value, "num_images": 100} | columns


def curve(network, metric="top1", series="linear", axis="block", values=(0.1, 0.3, 0.2), start=1):
    return [
        row(network, metric, value, series=series, axis=axis, at=start + i, standard_error=0.01 * (i + 1))
        for i, value in enumerate(values)
    ]


def drawn(axes):
    """Label -> points of every set of error bars: [(x, y)], and the bars' [(x low, x high, y low, y high)]."""
    found = {}
    for container in axes.containers:
        line, _, bars = container
        points = list(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
        segments = [segment for bar in bars for segment in bar.get_segments()]
        found[container.get_label()] = (
            points,
            [(*sorted(s[:, 0].tolist()), *sorted(s[:, 1].tolist())) for s in segments if s.ndim == 2],
        )
    return found


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


SINGLE = [
    row("A", "top1", 0.5, series="k=20", standard_error=0.02),
    row("A", "top5", 0.8, series="k=20", standard_error=0.01),
    row("B", "top1", 0.25, series="k=20", standard_error=0.03),
    row("B", "shape_bias", 0.4, low=0.1, high=0.5),
]


def test_every_number_is_a_point_with_its_error():
    figure = result_figure(SINGLE, "knn")
    (axes,) = figure.axes
    found = drawn(axes)
    assert list(found) == ["A", "B"]
    points = sorted(x for x, _ in found["A"][0] + found["B"][0])
    assert points == pytest.approx([25, 40, 50, 80])
    bars = {round((low + high) / 2, 6): high - low for low, high, *_ in found["A"][1]}
    assert bars == pytest.approx({50.0: 4.0, 80.0: 2.0})
    intervals = sorted((round(low, 9), round(high, 9)) for low, high, *_ in found["B"][1])
    assert intervals == [(10, 50), (22, 28)]
    # What is alike stands on one line, and networks beside each other.
    names = [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()]
    assert names == ["top-1 accuracy, k=20", "top-5 accuracy, k=20", "shape bias"]
    for label, expected in (("A", [0, 1]), ("B", [0, 2])):
        assert [round(y) for _, y in found[label][0]] == expected
    assert found["A"][0][0][1] < found["B"][0][0][1]
    colours = {c.get_label(): to_rgba(c[0].get_color()) for c in axes.containers}
    assert colours == {"A": to_rgba(PALETTE[0]), "B": to_rgba(PALETTE[1])}
    assert legend(figure) == ["A", "B"]
    assert figure.get_suptitle() == "knn"
    assert axes.get_xlabel() == "%"


def test_a_curve_for_each_network_and_series_and_axes_for_each_metric():
    rows = [
        row("A", "top1", 0.9, series="clean", standard_error=0.0),
        *(one for n in "AB" for series in ("faithful", "matched") for one in curve(n, "top1", series, "frequency")),
        *curve("A", "accuracy_drop", "faithful", "frequency", (0.5, math.nan, 0.0)),
    ]
    figure = result_figure(rows, "frequency_noise")
    single, top1, drop = figure.axes
    assert len(drawn(single)["A"][0]) == 1
    assert list(drawn(top1)) == ["A, faithful", "A, matched", "B, faithful", "B, matched"]
    for points, bars in drawn(top1).values():
        assert [round(number, 9) for point in points for number in point] == [1, 10, 2, 30, 3, 20]
        assert sorted(high - low for _, _, low, high in bars) == pytest.approx([2, 4, 6])
    assert [axes.get_title(loc="left") for axes in (top1, drop)] == ["top-1 accuracy", "drop in top-1 accuracy"]
    assert top1.get_xlabel() == "noise frequency (radians per px)"
    styles = {c.get_label(): (c[0].get_color(), c[0].get_linestyle()) for c in top1.containers}
    assert len(set(styles.values())) == 4
    assert styles["A, faithful"][0] == styles["A, matched"][0] != styles["B, matched"][0]


def test_axes_fit_what_they_count():
    (blocks,) = result_figure(curve("A"), "x").axes
    assert blocks.get_xlabel() == "block"
    assert set(blocks.get_xticks().tolist()) >= {1, 2, 3}
    rates = [row("A", "grid_top1", 0.5, axis="learning_rate", at=10.0**-i, series="cls@2") for i in range(4)]
    (grid,) = result_figure(rates, "x").axes
    assert grid.get_xscale() == "log"
    (severity,) = result_figure(curve("A", axis="severity", series="fog"), "x").axes
    assert (severity.get_xlabel(), severity.get_xscale()) == ("severity", "linear")


@pytest.mark.parametrize("rows", [[row()], [row(value=math.nan)], [row(standard_error=math.nan)], curve("A")[:1]])
def test_one_row_is_enough(rows):
    figure = result_figure(rows, "x")
    assert len(drawn(figure.axes[0])) == 1
    assert to_png(figure).startswith(b"\x89PNG")


def test_published_numbers_are_grey_marks_of_one_entry():
    rows = [
        row("A", "top1", 0.5, published=0.745, published_source="DINO"),
        row("A", "top5", 0.7),
        row("B", "top1", 0.6, published=0.761, published_source="DINO"),
    ]
    figure = result_figure(rows, "knn")
    (axes,) = figure.axes
    marks = [line for line in axes.lines if line.get_label() == "published, of another network"]
    assert [mark.get_xdata().tolist() for mark in marks] == [[pytest.approx(74.5)], [pytest.approx(76.1)]]
    points = drawn(axes)
    assert [mark.get_ydata().tolist() for mark in marks] == [[points[n][0][0][1]] for n in "AB"]
    assert legend(figure) == ["published, of another network", "A", "B"]
    assert legend(result_figure(rows[1:2], "knn")) == ["A"]


def test_long_names_are_wrapped_and_all_stay_inside():
    series = "a corruption with a very long name of many words and more"
    rows = [row(f"a network with a name of very many letters, {n}", series=series, value=0.1 * n) for n in range(8)]
    figure = result_figure(rows, "x")
    to_png(figure)
    (axes,) = figure.axes
    (label,) = [tick.get_text() for tick in axes.get_yticklabels()]
    assert max(map(len, label.split("\n"))) <= LABEL_LETTERS
    assert label.replace("\n", " ") == f"top-1 accuracy, {series}"
    assert len(legend(figure)) == 8
    box, whole = axes.get_tightbbox(), figure.bbox
    assert 0 <= box.x0 < box.x1 <= whole.x1 + 1
    for one in figure.legends:
        frame = one.get_window_extent()
        assert -1 <= frame.x0 < frame.x1 <= whole.x1 + 1
        assert not frame.overlaps(axes.bbox)


def test_rows_of_many_networks_differ():
    figure = result_figure([row(str(n), value=0.01 * n) for n in range(12)], "x")
    (axes,) = figure.axes
    assert len({c[0].get_color() for c in axes.containers}) == 12
    assert len({c[0].get_ydata()[0] for c in axes.containers}) == 12


def test_the_files_hold_every_number(tmp_path):
    rows = [*SINGLE, row("C, with comma", value=math.nan, note='a "quoted" note\nof two lines'), *curve("A")]
    paths = write_results(tmp_path / "deep" / "folder", rows, "knn")
    assert [path.name for path in paths] == ["results.json", "results.csv", "results.png", "results.svg"]
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == sorted(p.name for p in paths)
    plain = json.loads(paths[0].read_text())
    assert all(set(one) == set(COLUMNS) for one in plain)
    for one, original in zip(plain, rows, strict=True):
        assert {k: v for k, v in one.items() if k != "value"} == {k: v for k, v in original.items() if k != "value"}
        assert one["value"] == (None if math.isnan(original["value"]) else original["value"])
    with paths[1].open(newline="") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert [float(one["value"]) for one in found] == pytest.approx([one["value"] for one in rows], nan_ok=True)
    assert (found[4]["network"], found[4]["note"]) == ("C, with comma", 'a "quoted" note\nof two lines')
    assert found[0]["low"] == ""
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring(paths[3].read_text()).tag.endswith("svg")


def test_the_same_rows_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_results(tmp_path / name, SINGLE, "knn")
    for ending in ("json", "csv", "svg"):
        one, other = ((tmp_path / name / f"results.{ending}").read_bytes() for name in ("a", "b"))
        assert one == other


def test_a_column_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="colour"):
        write_results(tmp_path, [row(colour="red")], "knn")


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    paths = write_results(tmp_path, SINGLE[:1], "knn")
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, SINGLE, "knn")
    assert [path.read_bytes() for path in paths] == before
    assert len(list(tmp_path.iterdir())) == 4
