"""The page in Debian's Chromium: what a visitor does there, and what is in the database afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from online.server.serving import (
    ADMIN_KEY,
    ANNOTATOR_KEY,
    KEY,
    Live,
    listening,
    make_chat_tokenizer,
    make_model,
    make_service,
    until,
)

from alignfast.online.feedback import Shown, Vote
from alignfast.online.server.versions import weights_hash

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MARKUP = '<img src=x onerror="window.ran=1"><script>window.ran=1</script><b>bold</b>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="there is no Playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # as root there is no sandbox, and in a container /dev/shm is small
        launched = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """On the loopback, without keys."""
    with listening(make_service(keys=None, model=make_model(positions=512))) as live:
        yield live


@pytest.fixture(scope="module")
def keyed() -> Iterator[Live]:
    with listening(make_service()) as live:
        yield live


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """A page in a browser of its own, whose scripts fail nowhere and which asks nobody but its server."""
    opened, faults = [], []

    def open_page(live: Live, path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**options)
        opened.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()

        def look(request: Any) -> None:
            if not request.url.startswith(f"{live.url}/"):
                faults.append(f"outside: {request.url}")

        page.on("request", look)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("console", lambda told: faults.append(told.text) if "Content Security" in told.text else None)
        page.goto(live.url + path)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert not faults


def ask(page: Any, message: str = "the cat sat", answers: int = 2) -> list[Any]:
    """The answers to a message, once they are whole."""
    if answers != 2:
        page.get_by_label("Answers").select_option(str(answers))
    page.get_by_label("Message", exact=True).fill(message)
    page.get_by_role("button", name="Send").click()
    turn = page.locator(".turn").last
    turn.locator(".judge").wait_for()
    found = turn.locator(".answer").all()
    assert len(found) == answers
    return found


def sign_in(page: Any, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def votes(live: Live, user: str | None = None, current: bool = True) -> list[Vote]:
    return live.store.votes(users=None if user is None else [user], current=current)


def last_vote(live: Live, number: int) -> Vote:
    """The newest vote, once there are so many current ones."""
    until(lambda: len(votes(live)) >= number)
    (*_, newest) = votes(live)
    return newest


def test_the_better_of_two_answers_is_in_the_database(live: Live, visit: Callable[..., Any]) -> None:
    page, before = visit(live), len(votes(live))
    left, right = ask(page)
    assert left.bounding_box()["y"] == right.bounding_box()["y"]  # side by side
    assert left.bounding_box()["x"] + left.bounding_box()["width"] < right.bounding_box()["x"]
    button = page.get_by_role("button", name="Right is better")
    button.click()
    vote = last_vote(live, before + 1)
    assert vote.kind == "pair"
    assert vote.user.startswith("browser-")
    (better,) = (one for one in live.store.judged([vote])[0].answers if one.id == vote.value)
    assert better.text == right.locator(".text").inner_text().replace("An empty answer.", "")
    page.get_by_text("Saved. You can still change it.").wait_for()
    assert button.get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Tie").click()  # another mind: the last one counts, the first is kept
    until(lambda: votes(live)[-1].value == "tie")
    assert [one.value for one in votes(live, vote.user, current=False)] == [vote.value, "tie"]


def test_a_comment_goes_with_the_vote_as_it_was_written(live: Live, visit: Callable[..., Any]) -> None:
    page, before = visit(live), len(votes(live))
    ask(page)
    page.get_by_label("Comment").fill(MARKUP)
    page.get_by_role("button", name="Left is better").click()
    assert last_vote(live, before + 1).comment == MARKUP
    page.get_by_text("Saved. You can still change it.").wait_for()
    page.get_by_label("Comment").fill("clearer")
    page.get_by_role("button", name="Save comment").click()
    until(lambda: votes(live)[-1].comment == "clearer")
    assert votes(live)[-1].kind == "pair"


def test_thumbs(live: Live, visit: Callable[..., Any]) -> None:
    page, before = visit(live), len(votes(live))
    ask(page)
    page.get_by_role("button", name="Answer A is good").click()
    assert last_vote(live, before + 1).value == "up"
    down = page.get_by_role("button", name="Answer B is bad")
    down.click()
    vote = last_vote(live, before + 2)
    assert (vote.kind, vote.value) == ("thumb", "down")
    assert down.get_attribute("aria-pressed") == "true"
    assert page.get_by_role("button", name="Answer B is good").get_attribute("aria-pressed") == "false"


def test_the_chat_goes_on_with_the_better_answer(live: Live, visit: Callable[..., Any]) -> None:
    page = visit(live)
    ask(page)
    page.get_by_role("button", name="Right is better").click()
    page.get_by_text("Saved. You can still change it.").wait_for()
    right = page.locator(".answer .text").nth(1).inner_text()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "the dog")
    body = asked.value.post_data_json
    if right != "An empty answer.":
        assert [turn["content"] for turn in body["messages"]] == ["the cat sat", right, "the dog"]
    assert body["alignfast"] == {"pair": True}


def order(page: Any) -> list[str]:
    return page.locator(".rank .letter").all_inner_texts()


def test_four_answers_are_ranked_by_keys(live: Live, visit: Callable[..., Any]) -> None:
    page, before = visit(live), len(votes(live))
    ask(page, answers=4)
    ids = page.locator(".rank").evaluate_all("rows => rows.map(row => row.dataset.id)")
    page.get_by_role("button", name="Answer D, move").focus()
    for key in ("ArrowUp", "Home"):
        page.keyboard.press(key)
    assert order(page) == ["D", "A", "B", "C"]
    page.keyboard.press("3")  # the focus is still on it
    assert order(page) == ["A", "B", "D", "C"]
    page.get_by_text("Answer D: place 3 of 4").wait_for()  # for who can't see it
    page.keyboard.press("=")
    page.get_by_role("button", name="Answer C: higher").click()
    assert order(page) == ["A", "B", "C", "D"]
    # among level ones it is level
    assert page.locator(".rank .place").all_inner_texts() == ["1", "2", "2", "2"]
    page.get_by_role("button", name="Answer D: level with the one above").click()
    page.get_by_role("button", name="Save ranking").click()
    vote = last_vote(live, before + 1)
    assert vote.value == ((ids[0],), (ids[1], ids[2]), (ids[3],))
    assert page.locator(".rank .place").all_inner_texts() == ["1", "2", "2", "4"]
    assert len(live.store.judged([vote])[0].answers) == 4


def test_four_answers_are_ranked_by_drag(live: Live, visit: Callable[..., Any]) -> None:
    page, before = visit(live, viewport={"width": 1000, "height": 1400}), len(votes(live))
    ask(page, answers=4)
    ids = page.locator(".rank").evaluate_all("rows => rows.map(row => row.dataset.id)")
    page.locator(".ranks").scroll_into_view_if_needed()

    def drag(letter: str, to: str) -> None:
        start = page.get_by_role("button", name=f"Answer {letter}, move").bounding_box()
        end = page.get_by_role("button", name=f"Answer {to}, move").bounding_box()
        page.mouse.move(start["x"] + 5, start["y"] + 5)
        page.mouse.down()
        page.mouse.move(end["x"] + 5, end["y"] + end["height"] / 2, steps=12)
        page.mouse.up()

    drag("D", "A")
    assert order(page)[0] == "D"
    drag("A", "C")
    assert order(page).index("A") > order(page).index("B")
    letters = order(page)
    page.get_by_role("button", name="Save ranking").click()
    vote = last_vote(live, before + 1)
    assert [place for (place,) in vote.value] == [ids["ABCD".index(letter)] for letter in letters]


def test_what_is_not_to_be_stored_is_not(live: Live, visit: Callable[..., Any]) -> None:
    page = visit(live)
    ask(page)
    kept = len(all_shown(live))
    page.get_by_role("switch").check()
    assert page.locator(".turn").count() == 0  # a chat of its own: none of it stands in a stored prompt later
    assert "Nothing is stored" in page.locator("#consent").inner_text()
    page.get_by_label("Message", exact=True).fill("my secret")
    page.keyboard.press("Enter")
    page.get_by_text("Version v1").wait_for()
    assert page.locator(".thumbs, .judge").count() == 0
    said = len(votes(live))
    page.get_by_role("button", name="Ask again").click()
    page.get_by_text("Version v1").wait_for()
    assert (len(all_shown(live)), len(votes(live))) == (kept, said)
    page.get_by_role("switch").uncheck()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "the dog")
    assert [turn["content"] for turn in asked.value.post_data_json["messages"]] == ["the dog"]
    assert len(all_shown(live)) == kept + 2


def all_shown(live: Live) -> list[Any]:
    from alignfast.online.store.tables import responses

    with live.store.read() as connection:
        return list(connection.execute(responses.select()))


def test_answers_are_shown_as_they_are_written_and_can_be_stopped(visit: Callable[..., Any]) -> None:
    with listening(make_service(keys=None, endless=True)) as live:
        page = visit(live)
        page.get_by_label("Message", exact=True).fill("the cat")
        page.get_by_role("button", name="Send").click()
        text = page.locator(".answer .text").first
        page.wait_for_function("() => document.querySelector('.text').textContent.length > 20")
        length = len(text.text_content())
        assert (text.get_attribute("aria-live"), text.get_attribute("aria-busy")) == ("polite", "true")
        until(lambda: len(text.text_content()) > length)
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Left is better").wait_for()
        assert text.get_attribute("aria-busy") == "false"
        until(lambda: len(all_shown(live)) == 2)
        until(lambda: [vote.value for vote in votes(live)] == ["stop", "stop"])
        page.get_by_role("button", name="Left is better").click()
        until(lambda: [vote.kind for vote in votes(live)] == ["implicit", "implicit", "pair"])


def test_what_is_copied_or_asked_again_is_told(live: Live, visit: Callable[..., Any]) -> None:
    page = visit(live, permissions=["clipboard-read", "clipboard-write"])
    before = len(votes(live))
    ids = [shown.id for shown in all_shown(live)]
    ask(page)
    page.get_by_role("button", name="Copy answer A").click()
    page.get_by_text("Copied").wait_for()
    until(lambda: [vote.value for vote in votes(live)[before:]] == ["copy"])
    page.get_by_role("button", name="Ask again").click()
    page.locator(".judge").wait_for()
    assert page.locator(".turn").count() == 1  # in place of the answers before
    until(lambda: len(votes(live)) == before + 2)  # A's hint is its last one
    assert [(vote.kind, vote.value) for vote in votes(live)[before:]] == [("implicit", "regenerate")] * 2
    drawn = [shown for shown in all_shown(live) if shown.id not in ids]
    assert len(drawn) == 4
    assert len({str(shown.prompt) for shown in drawn}) == 1  # what was asked again is no part of the chat
    assert votes(live)[before].response_id != votes(live)[before + 1].response_id


def test_a_key_is_asked_for_where_one_is_needed(keyed: Live, visit: Callable[..., Any]) -> None:
    page = visit(keyed)
    sign_in(page, "af_nobody_0000000000")
    page.get_by_text("This key is not good.").wait_for()
    assert not page.get_by_label("Message", exact=True).is_visible()
    sign_in(page, KEY)
    ask(page)
    page.get_by_role("button", name="Left is better").click()
    until(lambda: len(votes(keyed, "ann")) == 1)
    page.reload()
    page.get_by_label("Message", exact=True).wait_for()  # the cookie stays
    assert KEY not in page.evaluate(
        "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])"
    )
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").wait_for()


def test_an_annotator_ranks_the_queue(keyed: Live, visit: Callable[..., Any]) -> None:
    labels = keyed.store.labels
    labels.add(["the cat sat", MARKUP])
    page = visit(keyed, "/label")
    sign_in(page, ANNOTATOR_KEY)
    page.get_by_text("2 left for you").wait_for()
    assert page.locator(".answer").count() == 4
    assert not page.locator("#agreement").is_visible()
    ids = page.locator(".rank").evaluate_all("rows => rows.map(row => row.dataset.id)")
    assert {keyed.shown(id).user for id in ids} == {"label-queue"}
    page.get_by_role("button", name="Answer B, move").press("Home")
    page.get_by_label("Comment").fill("to the point")
    page.get_by_role("button", name="Save and go on").click()
    page.get_by_text("the last one").wait_for()
    (vote,) = votes(keyed, "cleo")
    assert vote.value == tuple((ids[i],) for i in (1, 0, 2, 3))
    assert vote.comment == "to the point"
    assert page.locator(".prompt").inner_text() == MARKUP  # as text
    assert page.locator("main img, main b").count() == 0
    page.get_by_role("button", name="Skip").click()
    page.get_by_text("Nothing waits for you. Thank you.").wait_for()
    user = visit(keyed, "/label")
    sign_in(user, KEY)
    user.get_by_text("this needs a key of role annotator or admin").wait_for()


def test_the_operator_sees_how_far_annotators_agree(visit: Callable[..., Any]) -> None:
    with listening(make_service(keys=None)) as live:
        live.store.labels.add(["the cat"])
        for number in range(2):
            page = visit(live, "/label")
            page.get_by_role("button", name="Answer B, move").press("Home")
            page.get_by_role("button", name="Save and go on").click()
            page.get_by_text("Nothing waits for you. Thank you.").wait_for()
            page.get_by_text("Agreement between annotators").click()
            page.get_by_text(f"{number} of 1 prompts are ranked by 2 annotators each.").wait_for()
        assert "of 6 comparisons" in page.locator("#agreed").inner_text()
        assert page.locator("#agreed tbody tr").count() == 2


def add_version(live: Live, folder: Path, seed: int) -> None:
    make_model(seed).save_pretrained(folder)
    make_chat_tokenizer().save_pretrained(folder)
    live.store.versions.add(folder.name, "policy", str(folder), weights_hash(folder))


def test_the_operator_promotes_and_rolls_back(tmp_path: Path, visit: Callable[..., Any]) -> None:
    with listening(make_service()) as live:
        versions = live.store.versions
        add_version(live, tmp_path / "v1", 3)
        versions.promote("v1")
        add_version(live, tmp_path / "v2", 8)
        versions.set_figures(
            "v2", {"reward_accuracy": {"estimate": 0.71, "low": 0.66, "high": 0.76}, "kl": 0.0312}
        )
        versions.set_status("v2", "refused", [MARKUP])
        live.store.record_shown(Shown(id="r1", prompt="p", text="t", user="ann", policy_version="v1"))
        live.store.add_vote(Vote(response_id="r1", kind="thumb", value="up", user="ann"))
        page = visit(live, "/loop")
        sign_in(page, KEY)
        row = page.locator('tr[data-version="v2"]')
        assert "71.0 %66.0 to 76.0 %" in re.sub(r"\s*\n\s*", "", row.inner_text()).replace("\xa0", " ")
        assert "0.031" in row.inner_text()
        assert MARKUP in row.inner_text()  # as text
        assert "100.0\xa0%" in page.locator('tr[data-version="v1"]').inner_text()
        assert page.get_by_role("columnheader").all_inner_texts()[1:4] == [
            "Satisfaction",
            "Reward accuracy",
            "KL, nats a token",
        ]
        page.get_by_text("key can promote and roll back here").wait_for()
        assert page.get_by_role("button", name=re.compile("Promote|Roll back")).count() == 0
        page.get_by_role("button", name="Sign out").click()
        sign_in(page, ADMIN_KEY)
        page.get_by_role("button", name="Promote v2").click()
        page.get_by_role("dialog").get_by_role("button", name="Promote").click()
        row.get_by_text("serving").wait_for()
        assert served(live) == "v2"  # of the very next answer
        page.get_by_role("button", name="Roll back").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        page.locator('tr[data-version="v1"]').get_by_text("serving").wait_for()
        assert served(live) == "v1"
        page.locator('tr[data-version="v2"]').get_by_text("rolled back by hand").wait_for()


def served(live: Live) -> str:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
    with live.http() as http:
        return http.post("/v1/chat/completions", json=asked).json()["alignfast"]["version"]


def test_no_page_scrolls_sideways_on_a_phone(live: Live, visit: Callable[..., Any], tmp_path: Path) -> None:
    name = "a-version-with-a-name-of-more-than-forty-letters"
    add_version(live, tmp_path / name, 5)
    live.store.versions.set_figures(name, {"reward_accuracy": 0.7, "kl": 1.5, "win_rate": 0.5})
    live.store.labels.add(["the cat " * 40 + "a" * 200])
    page = visit(
        live, viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True, is_mobile=True
    )

    def fits() -> None:
        assert page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [360, 360]

    fits()
    upper, lower = ask(page, "the cat " * 30 + "b" * 200)
    assert upper.bounding_box()["y"] + upper.bounding_box()["height"] < lower.bounding_box()["y"]
    assert page.get_by_role("button", name="Upper is better").is_visible()
    fits()
    ask(page, answers=4)
    fits()
    for path, sign in (("/label", "Skip"), ("/loop", f"Promote {name}")):
        page.goto(live.url + path)
        page.get_by_role("button", name=sign).wait_for()
        fits()


def test_markup_in_an_answer_is_text(live: Live, visit: Callable[..., Any]) -> None:
    page, long = visit(live, viewport={"width": 360, "height": 740}), MARKUP + "c" * 300
    told = {
        "version": "v1",
        "weights": "1" * 64,
        "answers": [{"index": i, "response_id": f"r{i}"} for i in (0, 1)],
    }
    events = [
        {"choices": [{"index": i, "delta": {"content": long}, "finish_reason": "stop"}], "alignfast": told}
        for i in (0, 1)
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
    )
    answers = ask(page, MARKUP)
    assert [answer.locator(".text").inner_text() for answer in answers] == [long] * 2
    assert page.locator(".prompt").inner_text() == MARKUP
    assert page.locator("main img, main script, main b").count() == 0
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_an_error_is_told_in_the_servers_words(live: Live, visit: Callable[..., Any]) -> None:
    page = visit(live)
    page.get_by_label("Message", exact=True).fill("the cat " * 400)  # longer than the model's positions
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text()
    assert page.locator(".judge").count() == 0
    ask(page)  # and the chat goes on
