"""The page around a report: HTML and CSS in one text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --grid: #d9dde3; --paper: #ffffff; --card: #f5f6f8;
  --good: #1a7f52; --look: #9a6200; --bad: #c0303a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa4b2; --grid: #353c47; --paper: #14171c;
  --card: #1d2128; --good: #4cc38a; --look: #e0a33a; --bad: #f0707a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 2.6rem 0 .9rem; font-size: 1.15rem; }
p, li { max-width: 46rem; }
.soft { color: var(--soft); margin: .3rem 0 1.6rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.card, figure { margin: 0; padding: .9rem 1.1rem; background: var(--card); border-radius: .6rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
figcaption { margin-bottom: .4rem; font-weight: 600; font-size: .92rem; }
figcaption small { display: block; min-height: 1.5em; font-weight: 400; color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .5rem .8rem .5rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.findings { list-style: none; padding: 0; }
ul.findings li { margin: .35rem 0; }
.tag { display: inline-block; min-width: 3.2rem; font-weight: 700; }
.good { color: var(--good); } .look { color: var(--look); } .bad { color: var(--bad); }
details { margin-top: .6rem; }
details summary { cursor: pointer; color: var(--soft); }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
""".strip()


def page(title: str, subtitle: str, *parts: str) -> str:
    """A whole HTML document; title and subtitle are plain text, parts are HTML."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n{body}\n</body>\n</html>\n'
    )


def section(title: str, *parts: str) -> str:
    """A heading and what follows it; nothing where nothing follows."""
    body = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Figures in large type, each with its name below."""
    shown = "".join(
        f'<div class="card"><b>{escape(v)}</b><span>{escape(name)}</span></div>' for name, v in values
    )
    return f'<div class="cards">{shown}</div>' if values else ""


def figure(caption: str, drawing: str, note: str = "") -> str:
    """A plot with its caption; the drawing is SVG."""
    return (
        f"<figure><figcaption>{escape(caption)}<small>{escape(note)}</small></figcaption>{drawing}</figure>"
    )


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of plain text; `numbers` are the columns that hold figures."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if i in numbers else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    """Something folded away."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
