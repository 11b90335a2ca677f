"""Findings as JSON and CSV: nothing lost, nothing that is not a number passed off as one."""

import csv
import json
import math

import pytest

from harmonize.reports.files import COLUMNS, from_plain, to_plain, write_csv
from harmonize.types import Curve, Findings, Surface
from tests.reports.synthetic import findings, quantity

NAN, INF = math.nan, math.inf


def small() -> Findings:
    unit = quantity("Distance", "px", "Figure 3")
    curve = Curve(unit, [1, 2], [1.5, NAN], [0.1, INF], [[1.0, 2.0], [NAN, 4.0]], [[0.2, NAN], [0.3, 0.4]], [7.0, NAN])
    surface = Surface(quantity("Spectrum"), [0.0, 0.5], "frequency / pi", [0.0, 0.25], [[0.0, -1.0], [-INF, 2.0]])
    return Findings({"distance": curve}, {"distance": surface}, num_images=3)


def test_a_round_trip_through_json_changes_nothing():
    before = findings(depth=4, num_heads=3)
    for curve in before.curves.values():  # NaN differs from itself, so it has a test of its own
        curve.value = [0.0 if math.isnan(value) else value for value in curve.value]
    after = from_plain(json.loads(json.dumps(to_plain(before), allow_nan=False)))
    assert before.pictures
    assert not after.pictures
    assert after.curves == before.curves
    assert after.surfaces == before.surfaces
    assert after.num_images == 256


def test_what_is_not_finite_is_none_and_comes_back_as_nan():
    plain = to_plain(small())
    curve = plain["curves"]["distance"]
    assert curve["value"] == [1.5, None]
    assert curve["standard_error"] == [0.1, None]
    assert curve["heads"] == [[1.0, 2.0], [None, 4.0]]
    assert curve["head_standard_errors"] == [[0.2, None], [0.3, 0.4]]
    assert curve["uniform"] == [7.0, None]
    assert plain["surfaces"]["distance"]["value"] == [[0.0, -1.0], [None, 2.0]]
    assert plain["surfaces"]["distance"]["standard_error"] is None
    after = from_plain(plain)
    assert math.isnan(after.curves["distance"].value[1])
    assert math.isnan(after.curves["distance"].heads[1][0])
    assert math.isnan(after.surfaces["distance"].value[1][0])
    assert after.surfaces["distance"].error is None


def test_the_words_of_a_quantity_are_in_the_file():
    entry = to_plain(small())["curves"]["distance"]
    words = quantity("Distance", "px", "Figure 3")
    assert [entry[key] for key in ("title", "unit", "definition", "source", "figure")] == [
        words.title,
        words.unit,
        words.definition,
        words.source,
        words.figure,
    ]


def test_csv_has_one_number_a_row(tmp_path):
    write_csv(tmp_path / "numbers.csv", {"a, b": small(), "c": Findings()})
    with open(tmp_path / "numbers.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == COLUMNS
    assert rows == [
        ["a, b", "distance", "1", "", "", "", "1.5", "0.1", "px"],
        ["a, b", "distance", "1", "1", "", "", "1.0", "0.2", "px"],
        ["a, b", "distance", "1", "2", "", "", "2.0", "", "px"],
        ["a, b", "distance", "2", "", "", "", "", "", "px"],
        ["a, b", "distance", "2", "1", "", "", "", "0.3", "px"],
        ["a, b", "distance", "2", "2", "", "", "4.0", "0.4", "px"],
        ["a, b", "distance", "0.0", "", "frequency / pi", "0.0", "0.0", "", ""],
        ["a, b", "distance", "0.0", "", "frequency / pi", "0.25", "-1.0", "", ""],
        ["a, b", "distance", "0.5", "", "frequency / pi", "0.0", "", "", ""],
        ["a, b", "distance", "0.5", "", "frequency / pi", "0.25", "2.0", "", ""],
    ]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "numbers.csv"
    write_csv(path, {"a": small()})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_csv(path, {"b": small()})
    assert path.read_bytes() == before
