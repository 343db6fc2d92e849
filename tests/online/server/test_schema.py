"""Every route of the OpenAPI schema, asked what fits the schema and what does not: nothing is a server error.

Derandomised, so that a commit is judged by the same requests whenever it is; the slow test asks a hundred times more.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from online.server.serving import ADMIN_KEY, KEY, Live, listening, make_service

KEYS = {"an admin": ADMIN_KEY, "a user": KEY, "nobody": None}


def ask_all(live: Live, key: str | None, examples: int, number: int) -> Counter[tuple[str, int]]:
    """Statuses by route."""
    auth = {"Authorization": f"Bearer {ADMIN_KEY}"}
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", headers=auth)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    found: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not list(operation.body):
                continue  # it takes nothing that could be wrong

            @seed(number)
            @settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call(base_url=live.url, headers=headers, timeout=30)
                found[f"{case.method} {case.path}", answer.status_code] += 1
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)

            ask()
    return found


@pytest.fixture(scope="module")
def live() -> Any:
    with listening(make_service(max_body_bytes=100_000)) as live:
        yield live


@pytest.mark.parametrize("who", KEYS)
def test_no_request_is_a_server_error(live: Live, who: str) -> None:
    found = ask_all(live, KEYS[who], 6, 1)
    assert {"POST /v1/feedback", "POST /v1/chat/completions"} < {route for route, _ in found}
    opened = {route for route, status in found if status == 200}
    if who == "nobody":
        assert opened == {"GET /health"}
    else:
        assert ("POST /v1/feedback", 422) in found
        assert ("GET /metrics" in opened) == (who == "an admin")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_no_request_of_many_is_a_server_error(live: Live, number: int) -> None:
    print(sum(ask_all(live, ADMIN_KEY, 120, 100 + number).values()), "requests")
