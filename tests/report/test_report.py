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
from alignfast.report.plots import Line, interval_plot, line_plot


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


@pytest.mark.parametrize("drawing", ["lines", "intervals"])
def test_drawings_are_xml_of_their_own(drawing: str) -> None:
    if drawing == "lines":
        svg = line_plot(
            {"a": Line([1, 2], [0.1, 0.2]), "b & c": Line([1], [0.3], dashed=True)}, label='a "b" & c'
        )
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


def test_the_worst_comes_first() -> None:
    rows = [{**row, "loss": 0.6 + 0.02 * i, "grad_norm": 3.0} for i, row in enumerate(healthy_rows())]
    levels = [finding.level for finding in findings(rows, CONFIG)]
    assert levels == sorted(levels, key=["bad", "look", "good"].index)
    assert len(levels) > 1
    assert all(isinstance(finding, Finding) for finding in findings(rows, CONFIG))
