"""The page's files over HTTP: who gets them, with which headers, and colours that can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from online.server.serving import ANNOTATOR_KEY, KEY, Live, listening, make_service

import alignfast.online
from alignfast.online.server.guard import COOKIE
from alignfast.online.server.pages import FILES

FOLDER = Path(alignfast.online.__file__).parent / "page"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with listening(make_service()) as live:
        yield live


def test_the_files_are_there_for_everybody_and_nothing_else_is(live: Live) -> None:
    assert {"/", "/label", "/loop", "/static/style.css", "/static/chat.js"} <= FILES.keys()
    assert len(FILES) == len(list(FOLDER.iterdir()))
    with live.http(None) as http:
        for path, file in FILES.items():
            answer = http.get(path)
            assert (answer.status_code, answer.content) == (200, file.content)
            assert http.head(path).status_code == 200
            again = http.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for path in (
            "/static/",
            "/static/../server/guard.py",
            "/static/%2e%2e/server/guard.py",
            "/index.html",
        ):
            assert http.get(path).status_code == 401
        assert http.post("/", json={}).status_code == 405


def test_a_page_may_load_its_own_files_and_nothing_else(live: Live) -> None:
    with live.http(None) as http:
        headers = http.get("/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"
    for path in FOLDER.iterdir():
        text = path.read_text()
        outside = re.findall(
            r"""(?:https?:)?//[\w.-]+\.[a-z]{2,}""", text.replace("http://www.w3.org/2000/svg", "")
        )
        assert not outside, path
        assert "innerHTML" not in text, path


def test_a_session_says_who_asks_and_can_be_forgotten(live: Live) -> None:
    with live.http(None) as http:
        assert http.get("/v1/session").status_code == 401
    with live.http(ANNOTATOR_KEY) as http:
        http.post("/v1/session", json={})
        cookie = http.cookies[COOKIE]
    with live.http(None, cookies={COOKIE: cookie}) as http:
        told = http.get("/v1/session").json()
        assert told == {"object": "session", "user": "cleo", "role": "annotator", "by": "cookie"}
        left = http.delete("/v1/session")
        assert re.match(f'{COOKIE}="";.*Max-Age=0', left.headers["set-cookie"])
    with live.http(KEY) as http:
        assert http.get("/v1/session").json()["by"] == "key"


def luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    light, dark = (FOLDER / "style.css").read_text().split("@media (prefers-color-scheme: dark)", 1)
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark.split("* {")[0]))
    assert len(found) == 10
    grounds = ("ground", "surface")
    pairs = [
        *product(("text", "muted", "accent", "bad"), grounds),
        ("accent", "tint"),
        ("on-accent", "accent"),
    ]
    for text, ground in pairs:
        assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for ground in grounds:
        assert contrast(found["edge"], found[ground]) >= 3, ground
