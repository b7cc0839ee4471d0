"""Metrics are read as written, pictures show them, and the summary says what is comparable and what not."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastprune import report

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
FILTERS = [16, 16, 32]
CONFIG = {"model": "resnet56", "data": "cifar10", "recipe": "faithful", "epochs": 300}


def record(epoch: int, top1: float = 50.0, **changes: Any) -> dict[str, Any]:
    kept = [8, 0, 24]
    scores = {"loss": 0.5, "top1": top1, "top5": 95.0}
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train": {**scores, "top1": top1 + 1},
        "test": scores,
        "penalty": 1.5,
        "sparsity": 40.0 + epoch,
        "kept_filters": sum(kept),
        "filters": sum(FILTERS),
        "kept_per_layer": kept,
        "lr": 0.1,
        "images_per_s": 100.0 * epoch,
        "seconds": 2.0,
        **({"layers": LAYERS, "filters_per_layer": FILTERS} if epoch == 1 else {}),
        **changes,
    }


def write(
    run: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None, tail: str = ""
) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (run / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
    if config is not None:
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colour_count(path: Path) -> int:
    return len(np.unique(pixels(path).reshape(-1, 3), axis=0))


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


def test_a_complete_last_line_without_newline_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


# ---- pictures ----


@pytest.mark.parametrize(("epochs", "layers"), [(1, 20), (8, 57)])
def test_a_run_is_drawn_into_two_pictures(tmp_path: Path, epochs: int, layers: int) -> None:
    many = {"layers": [f"layer.{i}" for i in range(layers)], "filters_per_layer": [16] * layers}
    kept = {"kept_per_layer": [i % 17 for i in range(layers)], "kept_filters": 400, "filters": 16 * layers}
    run = write(tmp_path, [record(e + 1, 50.0 + e, **many, **kept) for e in range(epochs)], CONFIG)
    curves, filters = report.plot_run(run)
    assert (curves, filters) == (run / "curves.png", run / "filters.png")
    assert pixels(curves).shape == (572, 1430, 3)
    height, width, _ = pixels(filters).shape
    assert width == 1040
    assert height / layers > 20  # room for a name of 7.5 points at 130 dots an inch
    assert colour_count(curves) > 50
    assert colour_count(filters) > 50
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "curves.png",
        "filters.png",
        "metrics.jsonl",
    ]


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report.plot_run(write(tmp_path, [record(1)]))
    assert dict(matplotlib.rcParams) == before


def lines_of(figure: Figure, panel: int) -> dict[str, list[float]]:
    return {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in figure.axes[panel].lines}


def test_curves_show_the_metrics(tmp_path: Path) -> None:
    metrics = report.read_metrics(write(tmp_path, [record(1, 40.0), record(2, 70.0), record(3, 60.0)]))
    figure = report.curves_figure(metrics, "a title")
    assert figure.get_suptitle() == "a title"
    assert lines_of(figure, 0) == {
        "train (last 61.00)": [41.0, 71.0, 61.0],
        "test (last 60.00, best 70.00 at epoch 2)": [40.0, 70.0, 60.0],
    }
    assert lines_of(figure, 1) == {
        "filters kept of all filters (last 32 of 64)": [50.0, 50.0, 50.0],
        "sparsity: zeros of all weights and biases (last 43.00)": [41.0, 42.0, 43.0],
    }
    assert [np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines] == [[1, 2, 3]] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["top-1 (%)", "share (%)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epochs finished"}


def test_bars_show_the_kept_share_of_each_layer_in_model_order() -> None:
    first = record(1)
    assert report.kept_shares(first) == [50.0, 0.0, 75.0]
    axes = report.filters_figure(first, "title").axes[0]
    everything, kept = axes.containers
    assert [bar.get_width() for bar in kept] == [50.0, 0.0, 75.0]
    assert [bar.get_width() for bar in everything] == [100.0] * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    assert axes.yaxis_inverted()  # the first layer is on top
    assert [text.get_text() for text in axes.texts] == ["8 / 16", "0 / 16", "24 / 32"]
    assert axes.get_title(loc="left") == "title\n32 of 64 filters kept after epoch 1"


def test_runs_are_compared_in_one_picture_with_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write(tmp_path / name, [record(1, 40.0), record(2, 45.0)], CONFIG) for name in ("a", "b")]
    runs.append(write(tmp_path / "c", [record(1, 90.0)], {"model": "resnet20"}))
    figures: list[Figure] = []
    original = report._write

    def write_and_keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        original(figure, path)

    monkeypatch.setattr(report, "_write", write_and_keep)
    out = tmp_path / "both.png"
    report.compare_runs(runs, out)
    title = "resnet56 · cifar10 · faithful"
    assert lines_of(figures[0], 0) == {
        f"{title} (a): last 45.00 %": [40.0, 45.0],
        f"{title} (b): last 45.00 %": [40.0, 45.0],
        "resnet20: last 90.00 %": [90.0],
    }
    assert [np.asarray(line.get_ydata()).tolist() for line in figures[0].axes[1].lines] == [
        [41.0, 42.0],
        [41.0, 42.0],
        [41.0],
    ]
    assert len(figures[0].legends[0].get_texts()) == 3
    assert pixels(out).shape[1] == 1430
    assert colour_count(out) > 50
    with pytest.raises(ValueError, match="no runs to compare"):
        report.compare_runs([], out)


def test_a_config_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    run = write(tmp_path, [record(1)])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        report.plot_run(run)


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
    assert (
        "'faithful' does, this run as 'fast'" in report.comparison(config, record(300), record(300))["note"]
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "resnet20"}, "this is model resnet20"),
        ({"data": "embedded", "epochs": 5}, "this is data embedded, epochs 5"),
        ({"prune_rate": 0.4}, "no run at rate 0.4, unregularised"),
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
        "  last epoch (2): test top-1 60.00 %, top-5 95.00 %, loss 0.5000; "
        "sparsity 42.00 %, 32 of 64 filters kept"
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
        '  the authors\' "pruned, rate 0.6": best epoch of 300 80.81 %, '
        "last 50 epochs 74.7 ± 3.9 %, sparsity 70.26 %"
    )
    assert lines[5] == "  ours against their best: last -0.81, best +1.00 points"
    assert lines[6].startswith("  The authors' figure is the test accuracy of their best epoch of 300")
