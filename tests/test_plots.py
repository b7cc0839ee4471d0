"""Pictures show the metrics they are drawn from."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from run_records import CONFIG, LAYERS, record, write

from fastprune import plots, report


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colour_count(path: Path) -> int:
    return len(np.unique(pixels(path).reshape(-1, 3), axis=0))


@pytest.mark.parametrize(("epochs", "layers"), [(1, 20), (8, 57)])
def test_a_run_is_drawn_into_two_pictures(tmp_path: Path, epochs: int, layers: int) -> None:
    many = {"layers": [f"layer.{i}" for i in range(layers)], "filters_per_layer": [16] * layers}
    kept = {"kept_per_layer": [i % 17 for i in range(layers)], "kept_filters": 400, "filters": 16 * layers}
    run = write(tmp_path, [record(e + 1, 50.0 + e, **many, **kept) for e in range(epochs)], CONFIG)
    curves, filters = plots.plot_run(run)
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
    plots.plot_run(write(tmp_path, [record(1)]))
    assert dict(matplotlib.rcParams) == before


def lines_of(figure: Figure, panel: int) -> dict[str, list[float]]:
    return {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in figure.axes[panel].lines}


def test_curves_show_the_metrics(tmp_path: Path) -> None:
    metrics = report.read_metrics(write(tmp_path, [record(1, 40.0), record(2, 70.0), record(3, 60.0)]))
    figure = plots.curves_figure(metrics, "a title")
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
    assert plots.kept_shares(first) == [50.0, 0.0, 75.0]
    axes = plots.filters_figure(first, "title").axes[0]
    everything, kept = axes.containers
    assert [bar.get_width() for bar in kept] == [50.0, 0.0, 75.0]
    assert [bar.get_width() for bar in everything] == [100.0] * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    assert axes.yaxis_inverted()  # the first layer is on top
    assert [text.get_text() for text in axes.texts] == ["8 / 16", "0 / 16", "24 / 32"]
    assert axes.get_title(loc="left") == "title\n32 of 64 filters kept after epoch 1"


def test_runs_are_compared_in_one_picture_with_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write(tmp_path / name, [record(1, 40.0), record(2, 45.0)], CONFIG) for name in ("a", "b")]
    runs.append(write(tmp_path / "c", [record(1, 90.0)], {"model": "resnet20"}))
    figures: list[Figure] = []
    original = plots._write

    def write_and_keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        original(figure, path)

    monkeypatch.setattr(plots, "_write", write_and_keep)
    out = tmp_path / "both.png"
    plots.compare_runs(runs, out)
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
        plots.compare_runs([], out)


def test_a_config_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    run = write(tmp_path, [record(1)])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        plots.plot_run(run)
