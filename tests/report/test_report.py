"""The report's page and the doctor's findings, on runs written by hand."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from alignfast.findings import Finding, findings, read_run, series
from alignfast.report import write_report
from alignfast.report.plots import Line, Points, frontier_plot, interval_plot, line_plot, stack_plot
from alignfast.report.run import frontier, plots
from alignfast.report.seconds import seconds_table


def healthy_rows(number: int = 20) -> list[dict[str, Any]]:
    """A DPO run as it should be."""
    return [
        {
            "step": 10 * (i + 1),
            "time": 2.0 * i,
            "loss": 0.69 - 0.01 * i,
            "rewards/accuracies": 0.5 + 0.015 * i,
            "rewards/margins": 0.05 * i,
            "rewards/chosen": 0.01 * i,
            "rewards/rejected": -0.04 * i,
            "logps/chosen": -40 + 0.1 * i,
            "logps/rejected": -40 - 0.4 * i,
            "grad_norm": 0.8,
            "learning_rate": 1e-6,
            "tokens_per_second": 1000.0,
            "num_tokens": 5000 * i,
            "skipped_steps": 0,
            "epoch": (i + 1) / number,
        }
        for i in range(number)
    ]


def on_policy_rows(number: int = 20) -> list[dict[str, Any]]:
    """A GRPO run as it should be, evaluated every fifth step: each such step has a row of its own."""
    rows: list[dict[str, Any]] = []
    for i in range(number):
        step = i + 1
        rows.append(
            {
                "step": step, "time": 2.0 * i, "loss": 0.01 * (-1) ** i, "reward": 0.3 + 0.02 * i, "reward_std": 0.4,
                "frac_reward_zero_std": 0.1, "entropy": 2 - 0.02 * i, "kl": 0.001 * i, "clip_ratio/region_mean": 0.02,
                "completions/mean_length": 40.0, "completions/clipped_ratio": 0.1, "seconds/sampling": 3.0,
                "seconds/rewards": 0.5, "tokens_per_second": 100.0, "num_tokens": 500.0 * step, "grad_norm": 0.5,
                "epoch": step / number,
            }
        )  # fmt: skip
        if step % 5 == 0:
            rows.append(
                {
                    "step": step, "time": 2.0 * i, "eval_reward": 0.3 + 0.02 * i, "eval_gold/reward": 5 + 0.1 * i,
                    "eval_kl": 0.001 * i, "eval_kl_sequence": 0.04 * i, "eval_win_rate": 0.5 + 0.01 * i,
                    "eval_win_rate_low": 0.4 + 0.01 * i, "eval_win_rate_high": 0.6 + 0.01 * i, "eval_entropy": 2.0,
                    "eval_distinct_1": 0.4, "eval_distinct_2": 0.8,
                }
            )  # fmt: skip
    return rows


CONFIG = {"max_steps": 200, "max_grad_norm": 1.0, "num_train_epochs": 3.0, "seed": 7}


def write_run(folder: Path, rows: list[dict[str, Any]], samples: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


class _Page(HTMLParser):
    """Tags that are open at the end, the addresses that a browser would fetch, and the text."""

    _VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "script", "iframe"):
            self.fetched.append(tag)
        for name, value in attrs:
            # a reference into the page itself is no request
            if name in ("src", "href", "xlink:href", "srcset") and not (value or "").startswith("#"):
                self.fetched.append(value or "")
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    assert page.open == []
    return page


def test_page_has_everything_and_fetches_nothing(tmp_path: Path) -> None:
    samples = [
        {
            "step": step,
            "prompt": [{"role": "user", "content": "Is 1 < 2 & <b>so</b>?"}],
            "completion": f"at {step}",
        }
        for step in (0, 100, 200)
    ]
    path = write_report(write_run(tmp_path / "run", healthy_rows(), samples))
    page, html = read_page(path), path.read_text()
    assert path == tmp_path / "run" / "report.html"
    assert page.fetched == []
    assert re.search(r"url\((?!#)", html) is None
    assert "@import" not in html
    for caption in ("Loss", "Preference accuracy", "Margin", "Learning rate", "Speed"):
        assert caption in page.text
    assert "Is 1 < 2 & <b>so</b>?" in page.text  # escaped, not a tag
    assert "at 0" in page.text
    assert "at 200" in page.text
    assert "at 100" not in page.text
    assert "200 steps" in page.text


def test_page_suits_light_and_dark(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", healthy_rows())).read_text()
    assert "prefers-color-scheme: dark" in html
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert "var(--grid)" in drawing
        assert not re.search(r"#(000000|ffffff)", drawing)  # nothing that vanishes on one of the two papers


def test_an_sft_run_has_no_preference_plots(tmp_path: Path) -> None:
    rows = [{"step": i, "time": i, "loss": 2 - i / 10, "mean_token_accuracy": i / 10} for i in range(1, 8)]
    text = read_page(write_report(write_run(tmp_path / "run", rows))).text
    assert "Token accuracy" in text
    assert "Margin" not in text


def test_a_run_with_numbers_that_are_none(tmp_path: Path) -> None:
    rows = [
        {"step": i, "time": i, "loss": "NaN" if i == 3 else 1.0 / i, "skipped_steps": i >= 3}
        for i in range(1, 9)
    ]
    text = read_page(write_report(write_run(tmp_path / "run", rows))).text
    assert "skipped" in text
    assert "at step 3" in text


def test_an_on_policy_run_has_its_plots_and_samples(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"step": step, "prompt": "greedy?", "completion": f"greedy at {step}\u2028on"} for step in (0, 20)
    ]
    samples += [
        {
            "step": step,
            "prompt": "p",
            "completion": f"drawn at {step}",
            "reward": reward,
            "rewards": {"r": reward},
        }
        for step, reward in ((1, None), (10, 0.5), (20, 0.75))
    ]
    folder = write_run(tmp_path / "run", on_policy_rows(), samples)
    # as the command line writes them: a text may hold an end of line that JSON need not escape
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    (folder / "samples.jsonl").write_text("".join(lines))
    page = read_page(write_report(folder))
    assert page.fetched == []
    for caption in (
        "Reward against KL", "Gold reward", "Win rate", "KL to the reference", "KL of a completion", "Completion length",
        "Clip fraction", "Entropy", "Variety", "Seconds", "held-out win rate against the start",
    ):  # fmt: skip
        assert caption in page.text
    for text in ("greedy at 0", "greedy at 20", "drawn at 1", "none", "drawn at 20", "0.75"):
        assert text in page.text
    assert "drawn at 10" not in page.text
    assert "correctness" not in page.text


def test_completions_stand_with_the_reward_of_each_function(tmp_path: Path) -> None:
    rewards: list[dict[str, float | None]] = [
        {"correctness": 0.125, "form": None},
        {"correctness": 0.25, "form": 0.5},
    ]
    samples = [
        {"step": step, "prompt": "p", "completion": "c", "reward": 0.875, "rewards": of}
        for step, of in zip((1, 20), rewards)
    ]
    text = read_page(write_report(write_run(tmp_path / "run", on_policy_rows(), samples))).text
    cells = "".join(text[text.index("Completions that were trained on") :].split())
    assert "steppromptcompletioncorrectnessformreward" in cells
    assert "1pc0.125none0.87520pc0.250.50.875" in cells


def test_the_frontier_is_of_what_was_logged() -> None:
    held_out, training = on_policy_rows(), [row for row in on_policy_rows() if "kl" in row]
    assert "gold" in frontier(held_out)[0]
    assert "held-out completion" in frontier(held_out)[0]
    assert "gold" not in frontier(training)[0]
    assert "KL of a token" in frontier(training)[0]
    ppo = [{"step": i, "objective/kl": i, "objective/scores": i / 2, "kl": 1, "reward": 1} for i in range(3)]
    assert "KL of a completion" in frontier(ppo)[0]
    assert frontier(healthy_rows()) == []
    assert frontier(held_out[:1]) == []  # a point is no frontier


def test_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 tokens a step at 100 a second are 5 seconds; a draw serves 4 steps, so that 20 - 3.5 are left."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "alignfast.report.seconds.stack_plot", lambda steps, parts, label: drawn.update(parts) or ""
    )
    config = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    rows = on_policy_rows(8)
    plots(rows, config)
    assert drawn == {"other sampling": [3.0] * 2, "rewards": [0.5] * 2, "rest": [16.5] * 2}
    drawn.clear()
    stages = dict(prefill=0.5, decode=2.25, logps=0.25, forward=1.5, backward=2.0, optimizer=0.5)
    staged = [{**row, **{f"seconds/{name}": value for name, value in stages.items()}} for row in rows]
    plots(staged, config)
    of_steps = {"forward": 6.0, "backward": 8.0, "optimizer": 2.0}
    whole = {
        "prefill": 0.5,
        "decode": 2.25,
        "other sampling": 0.25,
        "rewards": 0.5,
        "log-probs": 0.25,
        **of_steps,
        "rest": 0.25,
    }
    assert drawn == {name: [value] * 2 for name, value in whole.items()}
    assert list(drawn) == list(whole)
    said = seconds_table(staged, config)
    assert "<td>decode</td><td class=n>2.25</td><td class=n>11.2%</td>" in said
    assert "<td>a draw and its steps</td><td class=n>20</td><td class=n>100.0%</td>" in said
    drawn.clear()
    trains = [{**row, "seconds/forward": 1.0, "seconds/backward": 2.0} for row in healthy_rows()[1:]]
    plots(trains, {"gradient_accumulation_steps": 4})
    assert drawn["forward"] == [1.0] * len(trains)
    assert seconds_table(healthy_rows(), config) == ""


@pytest.mark.parametrize("drawing", ["lines", "intervals", "band", "frontier", "stack", "stack of one"])
def test_drawings_are_xml_of_their_own(drawing: str) -> None:
    if drawing == "lines":
        svg = line_plot(
            {"a": Line([1, 2], [0.1, 0.2]), "b & c": Line([1], [0.3], dashed=True)}, label='a "b" & c'
        )
    elif drawing == "band":
        svg = line_plot({"a": Line([1, 2], [0.1, 0.2], band=([0, 0.1], [0.2, 0.3]))}, label="l")
    elif drawing.startswith("stack"):
        steps = [1.0] if drawing.endswith("one") else [1.0, 2.0, 5.0]
        svg = stack_plot(steps, {name: steps for name in ("a", "b & c", "rest")}, label="l")
    elif drawing == "frontier":
        points = {"a": Points([0, 1], [0, 1]), "b & c": Points([0, 1], [9, 8], right=True)}
        svg = frontier_plot(points, across="x < y", label="l")
    else:
        svg = interval_plot({"x": {"k": (0.5, 0.4, 0.6)}, "y": {"l": (0.1, 0.0, 0.2)}}, label="l", middle=0.5)
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert root.get("viewBox")
    assert root.get("width") is None
    assert "metadata" not in svg


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing was logged"):
        read_run(tmp_path)


def test_series_leaves_out_what_is_no_number() -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3}]
    assert series(rows, "loss") == ([1], [1.0])


def test_a_healthy_run_is_called_so() -> None:
    (found,) = findings(healthy_rows(), CONFIG)
    assert found.level == "good"
    assert "fell from" in found.text


def changed(name: str, values: Any) -> list[dict[str, Any]]:
    return [{**row, name: values(i)} for i, row in enumerate(healthy_rows())]


@pytest.mark.parametrize(
    ("rows", "level", "part"),
    [
        (changed("loss", lambda i: 0.6 + 0.02 * i), "bad", "rose"),
        (changed("loss", lambda i: 0.69), "look", "hardly moved"),
        (changed("loss", lambda i: math.nan if i == 4 else 0.69 - 0.01 * i), "bad", "at step 50"),
        (changed("skipped_steps", lambda i: int(i > 3)), "bad", "skipped"),
        (changed("eval_loss", lambda i: 0.6 + 0.01 * abs(i - 5)), "bad", "lowest at step 60"),
        (changed("rewards/accuracies", lambda i: 0.5), "bad", "little was learned"),
        (changed("rewards/accuracies", lambda i: 1.0), "look", "give an eval_dataset"),
        (changed("eval_rewards/accuracies", lambda i: 0.52), "look", "by heart"),
        (changed("logps/chosen", lambda i: -40 - 2 * i), "look", "less likely"),
        (changed("grad_norm", lambda i: 3.0), "look", "max_grad_norm=1"),
        (changed("grad_norm", lambda i: 90.0 if i == 7 else 0.8), "look", "At step 80"),
        (changed("tokens_per_second", lambda i: 1000.0 if i < 10 else 300.0), "look", "Speed fell"),
        (healthy_rows()[:12], "look", "--resume"),
        (healthy_rows()[:3], "look", "logging_steps"),
    ],
)
def test_each_trouble_is_found(rows: list[dict[str, Any]], level: str, part: str) -> None:
    found = findings(rows, CONFIG)
    assert any(finding.level == level and part in finding.text for finding in found), found


def test_a_healthy_on_policy_run_is_called_so() -> None:
    (found,) = findings(on_policy_rows(), {})
    assert found.level == "good"
    assert "The reward rose from 0.33 to 0.65" in found.text


def changed_draws(name: str, values: Any) -> list[dict[str, Any]]:
    return [{**row, name: values(row["step"])} if name in row else row for row in on_policy_rows()]


@pytest.mark.parametrize(
    ("rows", "level", "part"),
    [
        (
            changed_draws("eval_gold/reward", lambda s: 5 - abs(s - 10)),
            "bad",
            "highest at step 10 (5, at a KL of 0.36)",
        ),
        (changed_draws("eval_win_rate_high", lambda s: 0.45), "bad", "before training is the better one"),
        (changed_draws("reward", lambda s: 1 - 0.02 * s), "bad", "The reward fell"),
        (changed_draws("reward", lambda s: 0.5), "look", "hardly moved"),
        (changed_draws("frac_reward_zero_std", lambda s: 0.9), "look", "one and the same reward"),
        (changed_draws("entropy", lambda s: 2.0 / s**2), "look", "Entropy fell"),
        (
            changed_draws("completions/clipped_ratio", lambda s: 0.8),
            "look",
            "were cut at max_completion_length",
        ),
        (on_policy_rows(3), "look", "few rewards: 3"),
    ],
)
def test_each_trouble_of_an_on_policy_run_is_found(rows: list[dict[str, Any]], level: str, part: str) -> None:
    found = findings(rows, {})
    assert any(finding.level == level and part in finding.text for finding in found), found


def test_gold_that_falls_with_the_trained_reward_is_no_over_optimisation() -> None:
    rows = [
        {"step": s, "eval_reward": -abs(s - 2), "eval_gold/reward": -abs(s - 2), "reward": 0.1 * s}
        for s in range(5)
    ]
    assert not any("Over-optimisation" in finding.text for finding in findings(rows, {}))


def test_the_worst_comes_first() -> None:
    rows = [{**row, "loss": 0.6 + 0.02 * i, "grad_norm": 3.0} for i, row in enumerate(healthy_rows())]
    levels = [finding.level for finding in findings(rows, CONFIG)]
    assert levels == sorted(levels, key=["bad", "look", "good"].index)
    assert len(levels) > 1
    assert all(isinstance(finding, Finding) for finding in findings(rows, CONFIG))
