"""The presets are what the method says, and command lines, ours and the original program's, mean what they say."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastprune.recipes import RECIPES, Config, flag, parse, read_config, translate


def assert_fields(config: Config, **fields: Any) -> None:
    assert {name: getattr(config, name) for name in fields} == fields


# ---- presets ----


def test_faithful_is_what_the_authors_code_ran() -> None:
    faithful = parse(["--recipe", "faithful"])
    assert faithful == RECIPES["faithful"]
    assert_fields(faithful, model="resnet56", batch_size=256, epochs=300, seed=777)
    assert_fields(faithful, lr=0.2, schedule="constant", warmup_epochs=0, momentum=0.9, nesterov=False)
    assert_fields(faithful, weight_decay=1e-4, label_smoothing=0, precision="fp32")
    assert_fields(faithful, normalize="half", pad=4, flip=False, cutout=0)
    assert_fields(faithful, prune_type="structured", prune_rate=0.6, importance="l1", prune_every=4)
    assert_fields(faithful, feedback="straight-through", decorrelation="none")
    assert round(faithful.prune_until * faithful.epochs) == 226  # epochs 0 to 225


def test_description_is_what_their_text_says() -> None:
    description = parse(["--recipe", "description"])
    assert_fields(description, recipe="description", model="resnet50", batch_size=128, decorrelation="covariance")
    same = {"recipe", "model", "batch_size", "decorrelation"}
    for field in dataclasses.fields(Config):
        if field.name not in same:
            assert getattr(description, field.name) == getattr(RECIPES["faithful"], field.name), field.name


def test_fast_is_the_default_and_modern() -> None:
    fast = parse([])
    assert fast == RECIPES["fast"] == Config()
    assert_fields(fast, recipe="fast", model="resnet50", nesterov=True, flip=True, label_smoothing=0.1)
    assert_fields(fast, precision="auto", channels_last=True, feedback="normalized", data="auto")
    assert fast.schedule in ("cosine", "one-cycle")
    assert fast.warmup_epochs > 0


def test_quick_is_fast_on_a_small_network() -> None:
    assert_fields(parse(["--recipe", "quick"]), recipe="quick", model="resnet20", nesterov=True)
    assert parse(["--recipe", "quick"]).epochs < 20


def test_each_recipe_names_itself() -> None:
    assert all(config.recipe == name for name, config in RECIPES.items())


# ---- the command line ----


def test_the_original_command_line_is_understood() -> None:
    config = parse(["--prune_type", "structured", "--prune_rate", "0.6", "--reg", "reg_cov", "--odecay", "0.7"])
    assert_fields(config, prune_type="structured", prune_rate=0.6, decorrelation="covariance", alpha=0.7)


def test_the_other_flags_of_the_original_are_understood() -> None:
    line = "--layers 56 --prune_imp L1 --epochs 3 --batch_size 64 --lr 0.1 --momentum 0.8 --wd 1e-3 --recipe faithful"
    config = parse(line.split())
    assert_fields(config, model="resnet56", importance="l1", epochs=3, batch_size=64)
    assert_fields(config, lr=0.1, momentum=0.8, weight_decay=1e-3, recipe="faithful", schedule="constant")


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--layers=20", "model", "resnet20"),
        ("--prune_imp L2", "importance", "l2"),
        ("--prune-imp L2", "importance", "l2"),
        ("--reg reg_orth", "decorrelation", "orthogonality"),
        ("--reg None", "decorrelation", "none"),
        ("--prune_type None", "prune_type", "none"),
        ("--prune_type=unstructured", "prune_type", "unstructured"),
        ("--odecay=0.9", "alpha", 0.9),
    ],
)
def test_original_values_in_each_spelling(line: str, field: str, value: object) -> None:
    assert getattr(parse(line.split()), field) == value


@pytest.mark.parametrize("line", ["--batch_size 32", "--batch-size 32", "--batch_size=32", "--batch-size=32"])
def test_underscores_and_hyphens_are_one(line: str) -> None:
    assert parse(line.split()).batch_size == 32


def test_booleans_have_two_flags() -> None:
    assert not parse(["--no-flip"]).flip
    assert parse(["--recipe", "faithful", "--flip"]).flip
    assert parse(["--compile"]).compile
    assert parse(["--compact-when-frozen"]).compact_when_frozen


def test_every_field_of_a_recipe_can_be_overridden() -> None:
    line = """--recipe faithful --model resnet20 --stem imagenet --data embedded --data-root d --image-size 16
        --limit-train 9 --limit-test 8 --normalize data --pad 1 --flip --cutout 2 --epochs 3 --batch-size 4 --lr 5
        --schedule cosine --warmup-epochs 1.5 --momentum 0.5 --nesterov --weight-decay 0.1 --label-smoothing 0.2
        --prune-type unstructured --prune-rate 0.1 --importance taylor --prune-every 2 --prune-until 0.5
        --feedback none --decorrelation correlation --alpha 2 --no-include-diagonal --no-include-pruned
        --precision bf16 --device cpu --channels-last --compile --accumulate 2 --no-sync-batchnorm
        --prune-scope layer --min-kept 2 --round-to 8 --seed 1 --max-steps 7 --minutes 3 --target-accuracy 50 --out o"""
    config = parse(line.split())
    unchanged = {"recipe", "resume", "compact_when_frozen", "couple"}  # the last two are for filters only
    for field in dataclasses.fields(Config):
        if field.name not in unchanged:
            assert getattr(config, field.name) != getattr(RECIPES["faithful"], field.name), field.name


def test_translation_leaves_the_rest_alone() -> None:
    line = ["--out", "L1", "--data", "a=b", "--epochs", "56"]
    assert translate(line) == line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bogus 3", "--bogus"),
        ("stray", "stray"),
        ("--recipe slow", "slow"),
        ("--model vgg", "--model must be one of resnet20"),
        ("--lr high", "--lr"),
        ("--lr 0", "--lr must be above 0, got 0"),
        ("--lr nan", "--lr must be finite, got nan"),
        ("--batch-size 0", "--batch-size must be above 0"),
        ("--accumulate 0", "--accumulate must be above 0"),
        ("--batch-size 4 --accumulate 5", "at most --batch-size 4, got 5"),
        ("--epochs -1", "--epochs must be above 0"),
        ("--epochs 1.5", "--epochs"),
        ("--alpha nan", "--alpha must be finite, got nan"),
        ("--target-accuracy 101", "--target-accuracy must be in [0, 100], got 101"),
        ("--minutes 0", "--minutes must be above 0, got 0"),
        ("--minutes inf", "--minutes must be finite, got inf"),
        ("--lr inf", "--lr must be finite, got inf"),
        ("--max-steps 0", "--max-steps must be above 0"),
        ("--limit-train 0", "--limit-train must be above 0"),
        ("--prune-rate 1", "--prune-rate must be in [0, 1), got 1"),
        ("--prune-rate nan", "--prune-rate must be finite, got nan"),
        ("--prune-until 2", "--prune-until must be in [0, 1]"),
        ("--alpha -1", "--alpha must not be negative"),
        ("--seed -1", "--seed must not be negative"),
        ("--seed 2147483648", "--seed must be below"),
        ("--momentum 0", "--nesterov needs a --momentum above 0"),
        ("--importance taylor", "--importance taylor is for --prune-type"),
        ("--prune-type unstructured --importance grad --precision fp16", "cannot rank the gradients of fp16"),
        ("--precision fp8", "fp8"),
        ("--compact-when-frozen --prune-type unstructured", "it needs --prune-type structured"),
        ("--couple --prune-type unstructured", "it needs --prune-type structured"),
        ("--compact-when-frozen --prune-rate 0", "and a --prune-rate above 0"),
    ],
)
def test_bad_command_lines_end_with_a_message_and_status_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(line.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in said


NUMBERS = [field.name for field in dataclasses.fields(Config) if field.type in (int, float, int | None, float | None)]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_numbers(name: str) -> None:
    for value in ("1", True, torch.ones(())):
        with pytest.raises(TypeError, match=rf"{flag(name)} must be a (whole )?number, got "):
            dataclasses.replace(Config(), **{name: value})
    if "float" in str(Config.__annotations__[name]):
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"{flag(name)} must be finite, got {value}"):
                dataclasses.replace(Config(), **{name: value})
    else:
        with pytest.raises(TypeError, match=f"{flag(name)} must be a whole number, got 2.5"):
            dataclasses.replace(Config(), **{name: 2.5})


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = Config(epochs=np.int32(3), lr=np.float32(0.5), min_kept=np.int64(0))
    assert [type(config.epochs), type(config.lr), type(config.min_kept)] == [int, float, int]
    assert json.loads(json.dumps(config.to_json()))["lr"] == 0.5


def test_help_explains_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in ("--prune-rate", "--resume", "--target-accuracy", "faithful", "Share of filters"):
        assert text in out


def test_single_weights_take_the_plain_gradient() -> None:
    assert parse(["--prune-type", "unstructured"]).feedback == "straight-through"
    assert parse(["--prune-type", "unstructured", "--feedback", "none"]).feedback == "none"


def test_what_prunes() -> None:
    assert Config().prunes
    assert not Config(prune_rate=0).prunes
    assert not Config(prune_type="none").prunes


# ---- the configuration of a run to resume ----


def stored(folder: Path, config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch": "2", "config": config.to_json()}), encoding="utf-8")
    return folder


def test_a_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    config = dataclasses.replace(RECIPES["faithful"], data_root=Path("a"), out=Path("b"), alpha=0.3, max_steps=5)
    assert read_config(stored(tmp_path, config)) == config


def test_a_resumed_run_keeps_its_configuration_and_loses_its_limit(tmp_path: Path) -> None:
    run = stored(tmp_path / "run", dataclasses.replace(RECIPES["faithful"], max_steps=5, out=Path("elsewhere")))
    expected = dataclasses.replace(RECIPES["faithful"], out=run, resume=run)
    assert parse(["--resume", str(run)]) == expected
    assert parse([f"--resume={run}", "--recipe", "faithful"]) == expected
    assert parse(["--resume", str(run), "--max-steps", "9", "--out", "new"]) == dataclasses.replace(
        expected, max_steps=9, out=Path("new")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not the folder of a run: it has no config.json"),
        ("{", "config.json is not a run's configuration"),
        ("[]", "config.json is not a run's configuration"),
        ("{}", "config.json is not a run's configuration"),
        ('{"config": {"out": "a", "resume": null, "data_root": null, "magic": 1}}', "magic"),
    ],
)
def test_what_is_no_run_cannot_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        parse(["--resume", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_keeps_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--resume", str(stored(tmp_path, Config())), "--recipe", "faithful"])
    assert "--recipe faithful cannot be had with --resume of a 'fast' run" in capsys.readouterr().err
