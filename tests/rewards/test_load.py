"""What a reward can be named by, and what a wrong name is told."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alignfast.rewards import Exact, Format, Numeric, Regex, load_reward
from alignfast.rewards.protocol import accepted, check_signature, is_async, name_of

MODULE = "rewards_of_a_test"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{MODULE}.py").write_text(
        "LIMIT = 5\ndef length(completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    (tmp_path / "broken_of_a_test.py").write_text("import nothing_of_the_kind\n")
    yield tmp_path
    for name in (MODULE, "broken_of_a_test"):
        sys.modules.pop(name, None)


def test_named_verifiers() -> None:
    assert load_reward("numeric") == Numeric()
    assert load_reward("exact") == Exact()
    assert load_reward("format") == Format()
    assert load_reward(r"regex:a:\d+") == Regex(r"a:\d+")


def test_what_can_be_called_is_itself() -> None:
    for function in (len, functools.partial(len), Numeric()):
        assert load_reward(function) is function


@pytest.mark.parametrize("separator", [":", "."])
def test_import_path_from_the_working_directory(here: Path, separator: str) -> None:
    length = load_reward(f"{MODULE}{separator}length")
    assert length(completions=["abc"]) == [3]


def test_import_path_into_a_package() -> None:
    assert load_reward("alignfast.rewards.protocol:name_of") is name_of


def test_a_file_here_stands_in_for_no_installed_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "colorsys.py").write_text("def rgb_to_hsv(**columns): raise AssertionError\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert load_reward("colorsys.rgb_to_hsv")(1, 0, 0) == (0, 1, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numerik", "there is no reward 'numerik'; did you mean 'numeric'?"),
        ("numerik:x", "there is no module 'numerik'; did you mean 'numeric'?"),
        (f"{MODULE[:-1]}:length", f"there is no module '{MODULE[:-1]}'; did you mean '{MODULE}'?"),
        (f"{MODULE}:lenght", "has no 'lenght'; did you mean 'length'?"),
        (f"{MODULE}:LIMIT", "holds no function but a value as 'LIMIT'"),
        (
            "alignfast.reward.protocol:name_of",
            "no module 'alignfast.reward'; did you mean 'alignfast.rewards'?",
        ),
        ("alignfast.rewards.protcol:name_of", "did you mean 'alignfast.rewards.protocol'?"),
        (
            "broken_of_a_test:f",
            "importing 'broken_of_a_test' failed: ModuleNotFoundError: No module named 'nothing",
        ),
        ("models/rewrad", "there is no folder 'models/rewrad'; did you mean 'models/reward'?"),
        ("regex:(", "is no regular expression"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(here: Path, spec: str, message: str) -> None:
    (here / "models" / "reward").mkdir(parents=True)
    with pytest.raises(ValueError) as raised:
        load_reward(spec)
    assert message in str(raised.value)


def test_what_is_no_reward_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a reward function or the name of one, got int"):
        load_reward(3)
    with pytest.raises(TypeError, match="wrap a model"):
        load_reward(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="the class Numeric; make an object"):
        load_reward(Numeric)


def test_signatures_before_training() -> None:
    def plain(prompts, completions): ...
    def keywords(completions, solution, level=3, **columns): ...
    def positional(prompts, /): ...

    columns = ["prompt", "completion", "solution"]
    check_signature(plain, columns)
    check_signature(keywords, columns)
    check_signature(len.__class__, columns)  # no signature to look at
    with pytest.raises(
        ValueError, match=r"'keywords' needs 'solution', which is no column of the rows \(answer\)"
    ):
        check_signature(keywords, ["prompt", "answer"])
    with pytest.raises(ValueError, match="needs 'prompt'"):  # a row's prompt comes as `prompts`
        check_signature(lambda prompt: [], columns)
    with pytest.raises(ValueError, match="'prompts' by position alone"):
        check_signature(positional, columns)
    offered = {"prompts": 1, "completions": 2, "solution": 3, "trainer_state": 4}
    assert accepted(plain, offered) == {"prompts": 1, "completions": 2}
    assert accepted(keywords, offered) == offered


def test_async_is_seen_through_wrappers() -> None:
    async def judge(completions): ...

    class Judge:
        async def __call__(self, completions): ...

    assert is_async(judge)
    assert is_async(functools.partial(judge))
    assert is_async(Judge())
    assert not is_async(len)
    assert name_of(functools.partial(judge)) == "judge"
    assert name_of(Judge()) == "Judge"
