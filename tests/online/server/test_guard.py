"""Who may ask what: every route with and without keys, tokens for one response, cookies, and whose vote it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from online.server.serving import (
    ADMIN_KEY,
    ANNOTATOR_KEY,
    KEY,
    OTHER_KEY,
    Live,
    listening,
    make_service,
    until,
)

from alignfast.online.server.app import make_app
from alignfast.online.server.guard import COOKIE, PAGE_HEADER, Caller, Signer
from alignfast.online.server.run import check_address
from alignfast.online.store.keys import Role

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with listening(make_service()) as live:
        yield live


@pytest.fixture(scope="module")
def keyless() -> Iterator[Live]:
    with listening(make_service(keys=None)) as live:
        yield live


def ask(live: Live, key: str | None = KEY, **fields: Any) -> dict[str, Any]:
    """An answer's `alignfast`, of one with its id alone."""
    with live.http(key) as http:
        answer = http.post("/v1/chat/completions", json={**CHAT, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["alignfast"]["answers"][0]


def vote(live: Live, key: str | None, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    with live.http(key) as http:
        return http.post("/v1/feedback", json={"kind": "thumb", "value": True, **fields}, headers=headers)


def routes(live: Live) -> list[tuple[str, str]]:
    with live.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path.replace("{name}", "tiny")) for path, known in paths.items() for method in known
    ]


# --- every route ---


def test_every_route_but_health_needs_a_key(live: Live) -> None:
    found = routes(live)
    assert len(found) == 16
    wrong = [
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        "Bearer fbt-x.y",
        f"bearer{KEY}",
        "Bearer \u00e9",
    ]
    with live.http(None) as http:
        for method, path in [*found, ("GET", "/openapi.json"), ("GET", "/nowhere"), ("PUT", "/v1/models")]:
            for header in wrong:
                answer = http.request(method, path, headers={"Authorization": header.encode()}, json={})
                assert answer.status_code == (200 if path == "/health" else 401), (method, path, header)
        answer = http.post("/v1/feedback", json={}, headers={"Cookie": f"{COOKIE}=ann"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_users_key_opens_what_is_for_users(live: Live) -> None:
    for key, admins in ((KEY, 403), (ADMIN_KEY, 200)):
        with live.http(key) as http:
            assert http.get("/metrics").status_code == admins
            assert http.get("/v1/models").status_code == 200
            assert http.get("/nowhere").json()["error"]["message"] == "Not Found"
            assert http.put("/v1/models", json={}).status_code == 405


OWN_PAGE = {PAGE_HEADER: "1"}
USERS = {
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/feedback"), ("POST", "/v1/session"),
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/v1/loop"), ("GET", "/v1/session"), ("DELETE", "/v1/session"),
    ("GET", "/health"),
}  # fmt: skip
ANNOTATORS = {("GET", "/v1/label/next"), ("POST", "/v1/label/skip")}
ADMINS = {
    ("POST", "/v1/loop/promote"), ("POST", "/v1/loop/rollback"), ("GET", "/metrics"), ("GET", "/v1/label/agreement"),
}  # fmt: skip
BODIES: dict[str, Any] = {"/v1/loop/promote": {"version": "nowhere"}, "/v1/label/skip": {"item": "nowhere"}}


@pytest.mark.parametrize("by", ["key", "cookie", "cookie of another page"])
@pytest.mark.parametrize("key", [KEY, ANNOTATOR_KEY, ADMIN_KEY])
def test_every_route_by_role(live: Live, key: str, by: str) -> None:
    """By key and by cookie; an admin's cookie opens what is for admins and annotators on this server's page alone."""
    assert set(routes(live)) == USERS | ANNOTATORS | ADMINS
    allowed = USERS | (ANNOTATORS if key != KEY else set()) | (ADMINS if key == ADMIN_KEY else set())
    if by == "cookie of another page" and key == ADMIN_KEY:
        allowed = USERS
    if by != "key":
        allowed -= {("POST", "/v1/session")}
    for method, path in sorted(USERS | ANNOTATORS | ADMINS):
        with live.http(
            None if by != "key" else key, cookies=None if by == "key" else signed_in(live, key)
        ) as http:
            headers = OWN_PAGE if by == "cookie" else None
            status = http.request(method, path, json=BODIES.get(path, {}), headers=headers).status_code
        assert status != 401, (method, path)
        assert (status != 403) == ((method, path) in allowed), (method, path, status)


def signed_in(live: Live, key: str) -> dict[str, str]:
    with live.http(key) as http:
        return {COOKIE: http.post("/v1/session").cookies[COOKIE]}


def test_without_keys_the_loopback_alone_is_answered(keyless: Live) -> None:
    with keyless.http(None) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/metrics").status_code == 200
        assert http.get("/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", ""):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 403
        for host in ("localhost:8000", "localhost", "[::1]:8000", "127.0.0.1"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200
        form = http.post("/v1/feedback", content=b"{}", headers={"Content-Type": "text/plain"})
        assert form.status_code == 415  # what a page of another site can send without asking


def test_an_address_that_others_reach_needs_a_key(live: Live, keyless: Live) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"):
        with pytest.raises(ValueError, match="there is no key: make one with `alignfast keys make"):
            check_address(keyless.service, host)
        check_address(live.service, host)
    check_address(keyless.service, "127.0.0.1")


def test_a_route_that_is_added_is_guarded_before_anybody_thinks_of_it() -> None:
    service = make_service()
    app = make_app(service)
    app.app.add_api_route("/new", lambda: "secret")

    async def get() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/new")).status_code

    import asyncio

    assert asyncio.run(get()) == 401
    service.runner.stop()


# --- votes ---


def test_a_vote_is_taken_and_the_last_one_counts(live: Live) -> None:
    shown = ask(live)["response_id"]
    first, second = (vote(live, KEY, response_id=shown, value=value) for value in (True, False))
    assert first.json() | {"id": None} == {
        "object": "feedback",
        "id": None,
        "replaces": None,
        "kind": "thumb",
    }
    assert second.json()["replaces"] == first.json()["id"]
    assert [vote.value for vote in live.votes(shown)] == ["up", "down"]
    assert [vote.value for vote in live.store.votes(users=["ann"]) if vote.response_id == shown] == ["down"]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("thumb", [True, False], [1, "up", None, [], {}]),
        ("rating", [1, 5], [0, 6, True, 2.5, "5"]),
        ("pair", [{"than": "OTHER", "verdict": each} for each in ("tie", "better", "worse")],
                 [{"than": "SELF", "verdict": "tie"}, {"than": "OTHER"}, "OTHER", {"than": "OTHER", "verdict": "best"},
                  {"than": "OTHER", "verdict": "tie", "x": 1}]),
        ("ranking", [["OTHER", "SELF"], [["OTHER", "SELF"]]],
                    [["SELF"], ["OTHER"], ["SELF", "SELF"], ["SELF", ["SELF", "OTHER"]], [[], "SELF", "OTHER"], [], "SELF"]),
        ("edit", ["the cat sang"], ["", " ", 5, ["a"], "NUL\0"]),
        ("implicit", ["regenerate", "copy", "stop"], ["like", True]),
    ],
)  # fmt: skip
def test_each_kind_takes_its_values_alone(live: Live, kind: str, good: list[Any], bad: list[Any]) -> None:
    names = {"SELF": ask(live)["response_id"], "OTHER": ask(live)["response_id"]}

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: named(part) for name, part in value.items()}
        return [named(part) for part in value] if isinstance(value, list) else names.get(str(value), value)

    for value in good:
        answer = vote(live, KEY, response_id=names["SELF"], kind=kind, value=named(value))
        assert answer.status_code == 200, answer.text
        assert live.votes(names["SELF"])[-1].kind == kind
    for value in bad:
        assert vote(live, KEY, response_id=names["SELF"], kind=kind, value=named(value)).status_code == 422, (
            value
        )


def test_a_conversation_can_be_voted_on_by_who_had_it(live: Live) -> None:
    ask(live, episode_id="talk-1")
    assert vote(live, KEY, episode_id="talk-1", kind="rating", value=4).status_code == 200
    assert vote(live, OTHER_KEY, episode_id="talk-1", kind="rating", value=1).status_code == 404
    assert vote(live, KEY, episode_id="talk-2", kind="rating", value=4).status_code == 404
    assert vote(live, KEY, episode_id="talk-1", kind="edit", value="x").status_code == 422
    assert vote(live, KEY, episode_id="talk-1", response_id="x").status_code == 422
    assert vote(live, KEY).status_code == 422


def test_the_user_is_never_taken_from_the_body(live: Live) -> None:
    shown = ask(live)["response_id"]
    assert vote(live, KEY, response_id=shown, user="bob").status_code == 403
    assert vote(live, KEY, response_id=shown, user="ann").status_code == 200
    assert not live.votes(shown, "bob")
    shown = ask(live, user="bob")["response_id"]  # OpenAI's field, which says nothing here
    assert live.shown(shown).user == "ann"


def test_foreign_and_guessed_responses_can_not_be_voted_on(live: Live) -> None:
    shown, own = ask(live)["response_id"], ask(live, OTHER_KEY)["response_id"]
    foreign, guessed = (
        vote(live, OTHER_KEY, response_id=shown),
        vote(live, OTHER_KEY, response_id="chatcmpl-1"),
    )
    assert foreign.status_code == guessed.status_code == 404
    # the two are not told apart
    assert foreign.json()["error"]["message"].replace(shown, "") == guessed.json()["error"][
        "message"
    ].replace("chatcmpl-1", "")
    pair = vote(live, OTHER_KEY, response_id=own, kind="pair", value={"than": shown, "verdict": "better"})
    assert pair.status_code == 404
    assert not live.votes(own, "bob")


def test_a_token_allows_votes_on_its_response_and_nothing_else(live: Live) -> None:
    shown, other = ask(live), ask(live)
    token = shown["feedback_token"]
    assert vote(live, token, response_id=shown["response_id"], value=False).status_code == 200
    assert [vote.value for vote in live.votes(shown["response_id"], "anonymous")] == ["down"]
    assert vote(live, token, response_id=other["response_id"]).status_code == 403
    assert vote(live, token, episode_id="talk-1").status_code == 403
    than = {"than": other["response_id"], "verdict": "better"}
    assert vote(live, token, response_id=shown["response_id"], kind="pair", value=than).status_code == 403
    forged = token.replace(shown["response_id"], other["response_id"])
    assert vote(live, forged, response_id=other["response_id"]).status_code == 401
    with live.http(token) as http:
        assert {
            http.request(m, p, json=CHAT).status_code for m, p in routes(live) if "feedback" not in p
        } == {401, 200}
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 401


def test_votes_of_several_answers_have_an_id_and_a_token_each(live: Live) -> None:
    with live.http() as http:
        answers = http.post("/v1/chat/completions", json={**CHAT, "n": 3}).json()["alignfast"]["answers"]
    assert len({answer["response_id"] for answer in answers}) == 3
    ranked = [answer["response_id"] for answer in answers[::-1]]
    assert vote(live, KEY, response_id=ranked[0], kind="ranking", value=ranked).status_code == 200
    for answer in answers:
        assert vote(live, answer["feedback_token"], response_id=answer["response_id"]).status_code == 200


def test_an_idempotency_key_is_honoured(live: Live) -> None:
    shown = ask(live)["response_id"]
    key = {"Idempotency-Key": "9b2f"}
    first, again = (vote(live, KEY, key, response_id=shown, value=True) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert len(live.votes(shown)) == 1
    other = vote(live, KEY, key, response_id=shown, value=False)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    theirs = ask(live, OTHER_KEY)["response_id"]
    assert vote(live, OTHER_KEY, key, response_id=theirs).status_code == 200  # a key is its caller's own
    assert vote(live, KEY, {"Idempotency-Key": "k" * 256}, response_id=shown).status_code == 422


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"value": NaN}', b"\xff\xfe", b"{}"]
)
def test_bodies_that_are_no_vote_are_refused(live: Live, body: bytes) -> None:
    with live.http() as http:
        answer = http.post("/v1/feedback", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (422, True)
        assert http.get("/v1/feedback").status_code == 405


def test_a_comment_is_kept_as_text(live: Live) -> None:
    shown, comment = ask(live)["response_id"], "<script>alert(1)</script>"
    assert vote(live, KEY, response_id=shown, comment=comment).status_code == 200
    assert live.votes(shown)[-1].comment == comment
    assert vote(live, KEY, response_id=shown, comment="x" * 4001).status_code == 422
    assert vote(live, KEY, response_id=shown, weight=5).status_code == 422


# --- cookies ---


def test_a_cookie_stands_for_the_user_of_the_key(live: Live) -> None:
    with live.http() as http:
        begun = http.post("/v1/session")
    assert begun.json()["user"] == "ann"
    header = begun.headers["set-cookie"].lower()
    assert all(word in header for word in ("httponly", "samesite=strict", "max-age=43200"))
    cookies = {COOKIE: begun.cookies[COOKIE]}
    shown = ask(live)["response_id"]
    with live.http(None, cookies=cookies) as http:
        assert (
            http.post("/v1/feedback", json={"response_id": shown, "kind": "thumb", "value": True}).status_code
            == 200
        )
        assert http.post("/v1/session").status_code == 403  # or a cookie would live for ever
        assert http.get("/metrics").status_code == 403
    assert live.votes(shown)


def test_an_admins_cookie_is_good_on_this_servers_page_alone(live: Live) -> None:
    """A page of another port is of the same site, so that SameSite lets the cookie go with what it sends."""
    with live.http(None, cookies=signed_in(live, ADMIN_KEY)) as http:
        for site, status in (
            (None, 200),
            ("same-origin", 200),
            ("same-site", 403),
            ("cross-site", 403),
            ("none", 403),
        ):
            headers = OWN_PAGE if site is None else {**OWN_PAGE, "Sec-Fetch-Site": site}
            assert http.get("/metrics", headers=headers).status_code == status, site
        refused = http.get("/metrics", headers={"Sec-Fetch-Site": "same-origin"})
        assert (
            "an admin's cookie is good on this server's own page alone" in refused.json()["error"]["message"]
        )
        asked = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = PAGE_HEADER
        # which is how a browser asks whether it may
        answer = http.options("/v1/loop/rollback", headers=asked)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_cookie_ends_with_its_key() -> None:
    service = make_service()
    key, made = service.store.keys.make("dora", "admin")
    with listening(service) as live, live.http(None, cookies=signed_in(live, key)) as http:
        assert http.get("/metrics", headers=OWN_PAGE).status_code == 200
        service.store.keys.revoke(made.id)
        until(lambda: http.get("/metrics", headers=OWN_PAGE).status_code == 401)


def test_a_cookie_of_the_loopback_ends_with_the_first_key() -> None:
    with listening(make_service(keys=None)) as live, live.http(None) as http:
        assert http.post("/v1/session").status_code == 200
        assert http.get("/metrics", headers=OWN_PAGE).status_code == 200
        live.store.keys.make("ann")
        live.watch.look()
        assert http.get("/v1/models", headers=OWN_PAGE).status_code == 401


def test_a_token_with_a_cookie_is_the_cookies_vote(live: Live) -> None:
    with live.http(OTHER_KEY) as http:
        cookie = http.post("/v1/session").cookies[COOKIE]
    shown = ask(live)
    with live.http(shown["feedback_token"], cookies={COOKIE: cookie}) as http:
        body = {"response_id": shown["response_id"], "kind": "thumb", "value": True}
        assert http.post("/v1/feedback", json=body).status_code == 200
    assert live.votes(shown["response_id"], "bob")
    assert not live.votes(shown["response_id"], "anonymous")


def test_browsers_on_the_loopback_are_users_of_their_own(keyless: Live) -> None:
    users = set()
    for _ in range(2):
        with keyless.http(None) as http:
            users.add(http.post("/v1/session").json()["user"])
            shown = http.post("/v1/chat/completions", json=CHAT).json()["id"]
            assert keyless.shown(shown).user in users
            body = {"response_id": shown, "kind": "thumb", "value": True}
            assert http.post("/v1/feedback", json=body).status_code == 200
    assert len(users) == 2
    assert vote(keyless, None, response_id=shown).status_code == 404  # another one's, without the cookie


def test_cookies_and_tokens_are_good_for_what_they_were_made_for() -> None:
    signer, other = Signer(b"one"), Signer(b"two")
    cookie, token = signer.cookie("ann", 60), signer.token("cmpl-1")
    assert signer.caller_of(cookie) == Caller("ann", by="cookie")
    assert signer.caller_of(signer.cookie("ann", 60, key_id="3f")) == Caller("ann", by="cookie", key_id="3f")
    roles = {role: signer.caller_of(signer.cookie("ann", 60, role)) for role in get_args(Role)}
    assert {role: caller and caller.role for role, caller in roles.items()} == {
        "user": "user", "annotator": "annotator", "admin": "admin",
    }  # fmt: skip
    assert signer.caller_of(signer.cookie("ann", -1)) is None
    body, _, mac = cookie.rpartition(".")
    for wrong in (
        other.cookie("ann", 60),
        body,
        f"{body}.",
        f"{body}x.{mac}",
        cookie[:-1],
        "",
        ".",
        "\u00e9.\u00e9",
        token,
    ):
        assert signer.caller_of(wrong) is None
    for wrong in (
        other.token("cmpl-1"),
        token[:-1],
        "fbt-",
        "fbt-cmpl-1",
        "fbt-cmpl-1.",
        cookie,
        f"fbt-{cookie}",
    ):
        assert signer.response_of(wrong) is None


def test_votes_are_counted(live: Live) -> None:
    shown = ask(live)["response_id"]

    def counted() -> float:
        text = http.get("/metrics").text
        return sum(map(float, re.findall(r'alignfast_votes_total{kind="implicit"} (\S+)', text)))

    with live.http(ADMIN_KEY) as http:
        http.get("/nowhere")
        before = counted()
        for _ in range(3):
            vote(live, KEY, {"Idempotency-Key": "c"}, response_id=shown, kind="implicit", value="copy")
        text = http.get("/metrics").text
        assert counted() == before + 1
    assert 'alignfast_version{version="v1",weights="' + "1" * 64 in text
    assert 'alignfast_requests_total{method="POST",route="/v1/feedback",status="200"}' in text
    assert 'route="other"' in text  # what no route took has no name of its own
