"""Metrics are read as written, and the summary says what is comparable and what not."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_records import CONFIG, FILTERS, LAYERS, record, write

from fastprune import report

# ---- reading ----


def test_records_come_back_in_order_with_the_layers_of_the_first_line(tmp_path: Path) -> None:
    metrics = report.read_metrics(write(tmp_path, [record(1, 40.0), record(2, 60.0)]))
    assert [(m["epoch"], m["test"]["top1"]) for m in metrics] == [(1, 40.0), (2, 60.0)]
    assert all(m["layers"] == LAYERS and m["filters_per_layer"] == FILTERS for m in metrics)


@pytest.mark.parametrize("tail", ['{"epoch": 3, "st', "{", json.dumps(record(3))[:-1]])
def test_a_cut_off_last_line_is_dropped_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: str
) -> None:
    metrics = report.read_metrics(write(tmp_path, [record(1), record(2)], tail=tail))
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert capsys.readouterr().out == f"{tmp_path / 'metrics.jsonl'}, line 3 was cut off and is left out\n"


def test_a_complete_last_line_without_newline_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = report.read_metrics(write(tmp_path, [record(1)], tail=json.dumps(record(2))))
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert capsys.readouterr().out == ""


def test_the_later_record_of_a_repeated_epoch_counts(tmp_path: Path) -> None:
    records = [
        record(1),
        record(2, 10.0),
        record(3, 20.0),
        record(2, 30.0),
    ]  # resumed from the end of epoch 1
    metrics = report.read_metrics(write(tmp_path, records))
    assert [(m["epoch"], m["test"]["top1"]) for m in metrics] == [(1, 50.0), (2, 30.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[1]", "line 2: expected an object, found list"),
        ('{"epoch": 2}', "line 2: filters, images_per_s, .* missing"),
        (json.dumps(record(2, train=3)), r"line 2: train\.loss, train\.top1, train\.top5 missing"),
        (json.dumps(record(2, test={"top1": 1.0, "top5": 2.0})), r"line 2: test\.loss missing"),
    ],
)
def test_other_bad_lines_are_errors_with_their_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.read_metrics(write(tmp_path, [record(1)], tail=f"{line}\n{json.dumps(record(3))}\n"))


def test_layers_must_be_named_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: filters_per_layer, layers missing"):
        report.read_metrics(write(tmp_path, [record(2)]))


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        report.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="no finished epoch yet"):
        report.read_metrics(write(tmp_path, []))


def test_title_is_built_from_what_is_there() -> None:
    full = {**CONFIG, "prune_rate": 0.6, "decorrelation": "covariance", "alpha": 0.7, "seed": 3}
    assert report.run_title(full) == "resnet56 · cifar10 · faithful · rate 0.6 · covariance α 0.7 · seed 3"
    assert report.run_title({"model": "resnet20", "decorrelation": None, "alpha": 0.7}) == "resnet20"
    assert report.run_title({}, fallback="my run") == "my run"


# ---- summary ----


def test_authors_table_is_that_of_the_method() -> None:
    table = {(a.prune_rate, a.alpha): (a.best_top1, a.sparsity, a.last50) for a in report.AUTHORS_RESULTS}
    assert len(table) == len(report.AUTHORS_RESULTS) == 11
    assert table[0.0, None] == (88.57, 0.0, None)
    assert table[0.5, None] == (82.88, 52.05, None)
    assert table[0.6, None] == (80.81, 70.26, (74.7, 3.9))
    assert table[0.6, 0.7] == (82.28, 71.34, (75.3, 3.8))
    assert table[0.0, 0.7] == (88.00, 0.0, None)
    assert [table[0.5, alpha][:2] for alpha in (0.7, 0.8, 0.9)] == [
        (83.05, 48.94),
        (82.03, 50.35),
        (82.90, 49.48),
    ]
    assert {table[rate, None] for rate in (0.7, 0.8, 0.9)} == {(10.0, (82.0, 96.0), None)}


@pytest.mark.parametrize(
    ("settings", "run"),
    [
        ({"prune_rate": 0.6, "decorrelation": None, "alpha": 0.7}, "pruned, rate 0.6"),
        ({"prune_rate": 0.6, "decorrelation": "covariance", "alpha": 0.0}, "pruned, rate 0.6"),
        ({"prune_rate": 0.6, "decorrelation": "covariance", "alpha": 0.7}, "rate 0.6 + regularised 0.7"),
        ({"prune_rate": 0.5, "decorrelation": "correlation", "alpha": 0.9}, "rate 0.5 + regularised 0.9"),
        ({"prune_rate": 0.0, "decorrelation": None}, "dense"),
        ({"prune_rate": None}, "dense"),
    ],
)
def test_the_row_of_the_same_rate_and_regulariser_is_chosen(settings: dict[str, Any], run: str) -> None:
    result = report.comparison({**CONFIG, **settings}, record(300, 81.0), record(280, 83.0))
    assert result["comparable"] is True
    assert result["authors"]["run"] == run
    best = result["authors"]["best_top1"]
    assert result["difference_top1"] == {"last": round(81.0 - best, 4), "best": round(83.0 - best, 4)}
    assert list(result["difference_top1"]) == ["last", "best"]
    assert "best epoch of 300; ours names the last epoch first" in result["note"]
    assert ("always zero" in result["note"]) == ("regularised" in run)
    assert "recipe" not in result["note"]


def test_another_recipe_is_said() -> None:
    config = {**CONFIG, "prune_rate": 0.6, "recipe": "fast"}
    assert "'faithful' does, this run as 'fast'" in report.comparison(config, record(300), record(300))["note"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "resnet20"}, "this is model resnet20"),
        ({"data": "embedded", "epochs": 5}, "this is data embedded, epochs 5"),
        ({"prune_rate": 0.4}, "no run at rate 0.4, unregularised"),
        ({"train_images": 500}, "theirs saw 50,000 training images, and this run 500"),
        ({"prune_type": "unstructured"}, "theirs pruned whole filters, and this run single weights"),
        ({"decorrelation": "covariance", "alpha": 0.1}, "no run at rate 0.6, regularised with alpha 0.1"),
    ],
)
def test_other_runs_are_not_comparable_and_why_is_said(changes: dict[str, Any], why: str) -> None:
    result = report.comparison({**CONFIG, "prune_rate": 0.6, **changes}, record(300), record(300))
    assert result["comparable"] is False
    assert why in result["why"]


def test_an_unfinished_run_is_not_comparable() -> None:
    result = report.comparison({**CONFIG, "prune_rate": 0.6}, record(12), record(12))
    assert result == {"comparable": False, "why": "this run has finished 12 of its 300 epochs"}


def test_summary_names_the_last_first_then_the_best() -> None:
    metrics = [record(1, 40.0), record(2, 70.0), record(3, 70.0), record(4, 60.0)]
    result = report.summary({"model": "resnet20"}, metrics)
    assert list(result)[:4] == ["run", "last", "best", "comparison"]
    assert (result["last"]["epoch"], result["last"]["test"]["top1"]) == (4, 60.0)
    assert (result["best"]["epoch"], result["best"]["test"]["top1"]) == (2, 70.0)  # the earliest of equals
    assert (result["epochs"], result["seconds"], result["images_per_s"]) == (4, 8.0, 250.0)
    assert result["comparison"]["comparable"] is False
    assert "kept_per_layer" not in result["last"]
    assert json.loads(json.dumps(result)) == result
    with pytest.raises(ValueError, match="no finished epoch"):
        report.summary({}, [])


def test_summary_for_people() -> None:
    text = report.format_summary(report.summary({"model": "resnet20"}, [record(1, 70.0), record(2, 60.0)]))
    lines = text.splitlines()
    assert lines[0] == "resnet20"
    assert lines[1] == (
        "  last epoch (2): test top-1 60.00 %, top-5 95.00 %, loss 0.5000; sparsity 42.00 %, 32 of 64 filters kept"
    )
    assert lines[2] == "  best epoch (1): test top-1 70.00 %, sparsity 41.00 %"
    assert lines[3] == "  2 epochs in 0 h 00 min 04 s, 150 images/s"
    assert lines[4].startswith("  not comparable with the authors' table: theirs are resnet56 on cifar10")


def test_summary_for_people_beside_the_authors() -> None:
    config = {**CONFIG, "prune_rate": 0.6}
    metrics = [record(299, 81.81), record(300, 80.0, seconds=3661.0, images_per_s=12345.0)]
    lines = report.format_summary(report.summary(config, metrics)).splitlines()
    assert "2 epochs in 1 h 01 min 03 s" in lines[3]
    assert lines[4] == (
        '  the authors\' "pruned, rate 0.6": best epoch of 300 80.81 %, last 50 epochs 74.7 ± 3.9 %, sparsity 70.26 %'
    )
    assert lines[5] == "  ours against their best: last -0.81, best +1.00 points"
    assert lines[6].startswith("  The authors' figure is the test accuracy of their best epoch of 300")
