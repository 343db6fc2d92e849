"""Datasets from the hub: name, config and split reach `load_dataset`, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from alignfast.commands.parser import UsageError, parse_options
from alignfast.commands.train import RunOptions, _parts
from alignfast.data import DataError, HubDataset, load_rows

GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """What the hub was asked for; it has everything."""
    found = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        found.append((name, config, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


def test_names_that_are_no_file_go_to_the_hub(asked: list[tuple[str, str | None, str]]) -> None:
    rows = load_rows("someone/pairs", split="test")
    assert asked == [("someone/pairs", None, "test")]
    assert rows.where(0) == "someone/pairs (test), index 0"


def test_a_config_goes_with_the_name(asked: list[tuple[str, str | None, str]]) -> None:
    by_option = load_rows("openai/gsm8k", config="main")
    load_rows(HubDataset("openai/gsm8k", "main", "test"))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert by_option.name == "openai/gsm8k (main, train)"


def test_a_config_of_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="config='main' is for a dataset's name on the hub, got str 'rows"):
        load_rows("rows.jsonl", config="main")
    with pytest.raises(ValueError, match="got list"):
        load_rows([GOOD], config="main")


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        raise ConnectionError("couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'someone/pairs' is no file here, .*\(split 'train'\) failed: couldn't"
    ):
        load_rows("someone/pairs")
    with pytest.raises(DataError, match=r"\(config 'main', split 'train'\) failed"):
        load_rows("someone/pairs", config="main")


def parts(*flags: str) -> dict[str, Any]:
    """What `alignfast sft FLAGS` hands its trainer."""
    (options,) = parse_options("sft", ["--model", "m", *flags], RunOptions)
    return _parts(options)


def test_config_and_splits_on_the_command_line(asked: list[tuple[str, str | None, str]]) -> None:
    found = parts(
        *(
            "--dataset_name",
            "openai/gsm8k",
            "--dataset_config",
            "main",
            "--dataset_train_split",
            "train[:10]",
        ),
        *("--eval_dataset", "openai/gsm8k"),
    )
    for source in (found["train_dataset"], found["eval_dataset"]):
        load_rows(source)
    assert asked == [("openai/gsm8k", "main", "train[:10]"), ("openai/gsm8k", "main", "test")]


def test_files_stay_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    found = parts("--train_dataset", str(path), "--eval_dataset", "someone/pairs")
    assert found["train_dataset"] == str(path)
    assert found["eval_dataset"] == HubDataset("someone/pairs", None, "test")
    with pytest.raises(ValueError, match=r"missing\.jsonl: there is no such file"):
        parts("--train_dataset", str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset_config", "main"), "dataset_config is for datasets from the hub, got 'main' for files"),
        (
            ("--dataset_train_split", "dev"),
            "dataset_train_split is for a dataset from the hub, got 'dev' for",
        ),
        (("--dataset_test_split", "dev"), "dataset_test_split is .*, got 'dev' for no eval_dataset"),
    ],
)
def test_configs_and_splits_of_files_are_refused(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(UsageError, match=message):
        parts("--train_dataset", str(path), *flags)
