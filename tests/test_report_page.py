"""The report command writes pictures and one page that holds everything and loads nothing."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_records import CONFIG, record, write

import fastprune
from fastprune import checkpoint, html, models, report, train
from fastprune.recipes import Config
from fastprune.report_page import Options, draw


class Page(HTMLParser):
    """The cells of each table, the pictures, the text, and every tag with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.cell: list[str] | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.tables[-1][-1].append("".join(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.cell is not None:
            self.cell.append(data)

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def run_with_network(folder: Path, rate: float, top1: float) -> Path:
    """A run with a checkpoint: ResNet-20 of which the first filters are kept."""
    config = Config(model="resnet20", data="embedded", prune_rate=rate, decorrelation="none")
    torch.manual_seed(0)
    model = models.create("resnet20", 12)
    if config.prunes:
        for mask in fastprune.FilterPruner(model, rate=rate).masks().values():
            mask[int(len(mask) * (1 - rate)) :] = False
    folder.mkdir()
    checkpoint.save(folder / train.CHECKPOINT, {"model": model.state_dict()})
    described: dict[str, Any] = {**config.to_json(), "decorrelation": None, "config": config.to_json()}
    return write(folder, [record(epoch, top1 + epoch) for epoch in (1, 2)], described)


def test_one_run_is_drawn_and_put_on_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with_network(tmp_path / "a", 0.5, 60.0)
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / name) for name in ("curves.png", "filters.png", "report.html")]
    page = Page(run / "report.html")
    text = " ".join(page.text)
    assert "resnet20 · embedded · fast · rate 0.5 · seed 0" in text
    assert "62.00 %" in text
    assert "MACs left" in text
    assert [picture.size[0] for picture in page.pictures] == [1430, 1040]
    epochs, layers, settings = page.tables
    assert epochs[0][:5] == ["epoch", "train loss", "train top-1", "test loss", "test top-1"]
    assert [row[:5] for row in epochs[1:]] == [
        ["1", "0.500", "62.00 %", "0.500", "61.00 %"],
        ["2", "0.500", "63.00 %", "0.500", "62.00 %"],
    ]
    assert ["layer1.0.conv1", "Conv2d", "2,359,296", "25%", "2,304", "25%"] in layers
    assert ["conv1", "Conv2d", "442,368", "50%", "432", "50%"] in layers
    assert ["prune_rate", "0.5"] in settings


def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [run_with_network(tmp_path / "dense", 0.0, 70.0), run_with_network(tmp_path / "half", 0.5, 60.0)]
    runs.append(write(tmp_path / "old", [record(1, 40.0)], CONFIG))
    assert report.main([str(run) for run in runs]) == 0
    page = Page(tmp_path / "comparison.html")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size[0] == 1430
    table, settings = page.tables
    assert table[0][:3] == ["run", "test top-1, last", "best (epoch)"]
    assert [row[1] for row in table[1:]] == ["72.00 %", "62.00 %", "40.00 %"]
    assert [row[5] for row in table[1:]] == ["40.8 M (100%)", "10.3 M (25%)", "–"]
    assert ["prune_rate", "0", "0.5", "–"] in settings
    assert len(page.pictures) == 4
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
    ]


def test_equal_settings_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = tuple(write(tmp_path / name, [record(1)], CONFIG) for name in ("a", "b"))
    out = tmp_path / "page.html"
    draw(Options(runs, html=out))
    page = Page(out)
    assert [row[0] for row in page.tables[0][1:]] == [f"resnet56 · cifar10 · faithful ({name})" for name in "ab"]
    assert "None." in page.text


def test_a_run_without_a_checkpoint_says_what_is_not_known(tmp_path: Path) -> None:
    run = write(tmp_path / "a", [record(1)], {"model": "resnet20"})
    draw(Options((run,)))
    assert "is not a run's configuration" in " ".join(Page(run / "report.html").text)


def test_long_runs_have_a_table_of_bearable_length(tmp_path: Path) -> None:
    run = write(tmp_path / "a", [record(epoch) for epoch in range(1, 301)], CONFIG)
    draw(Options((run,)))
    epochs = [row[0] for row in Page(run / "report.html").tables[0][1:]]
    assert len(epochs) == 30
    assert epochs[-1] == "300"


EVIL = "<script>alert(1)</script>\"'&"


def test_the_page_loads_and_runs_nothing_whatever_a_run_is_called(tmp_path: Path) -> None:
    config = {**CONFIG, "model": EVIL, "recipe": f"{EVIL}2"}
    run = write(tmp_path / "a", [record(1, layers=[EVIL, "b", "c"])], config)
    draw(Options((run,)))
    page = Page(run / "report.html")
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not (attributes.get("href") or "").strip()
    assert "url(" not in (run / "report.html").read_text()
    assert not re.search(r"https?://", (run / "report.html").read_text())
    assert ["model", EVIL] in page.tables[-1]
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_tables_name_their_rows_and_columns() -> None:
    text = html.table([("a", "b"), ("c", "1 < 2")])
    assert '<th scope="col" class="left">a</th><th scope="col">b</th>' in text
    assert '<th scope="row" class="left">c</th><td>1 &lt; 2</td>' in text


def test_a_run_that_went_on_with_a_small_network_is_set_against_what_it_began_with(tmp_path: Path) -> None:
    data: dict[str, Any] = {"data": "embedded", "limit_train": 16, "limit_test": 8, "batch_size": 8, "image_size": 8}
    pruning: dict[str, Any] = {
        "prune_rate": 0.5,
        "prune_every": 1,
        "prune_until": 0.5,
        "couple": True,
        "compact_when_frozen": True,
    }
    train.run(Config(model="resnet20", device="cpu", epochs=2, out=tmp_path, **data, **pruning))
    draw(Options((tmp_path,)))
    page = Page(tmp_path / "report.html")
    (layer,) = (row for row in page.tables[1] if row[0] == "layer3.1.conv1")
    assert (layer[2], layer[4]) == ("147,456", "36,864")
    assert int(layer[3].rstrip("%")) < 60
    shares = re.findall(r"(?:MACs|parameters) left (\d+\.\d)%", re.sub(r"\s+", " ", " ".join(page.text)))
    assert [share for share in shares if float(share) < 90] == shares
    assert len(shares) == 2


@pytest.mark.slow
def test_latencies_are_measured_for_each_run(tmp_path: Path) -> None:
    run = run_with_network(tmp_path / "a", 0.5, 60.0)
    draw(Options((run,), latency=True))
    rows = Page(run / "report.html").tables[-1]
    assert [row[:3] for row in rows[1:3]] == [["eager", "1", "dense"], ["eager", "1", "compact"]]
    assert len(rows) == 1 + 3 * 2 * 2


def test_folders_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "fastprune.report: error: " in (text := capsys.readouterr().err)
    assert "it has no metrics.jsonl" in text
    with pytest.raises(SystemExit) as end:
        report.main([])
    assert end.value.code == 2
