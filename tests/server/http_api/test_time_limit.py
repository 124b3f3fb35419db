"""X-Request-Timeout becomes the request's deadline; what is not a number of seconds is refused."""

from __future__ import annotations

from typing import Any

import pytest

from adaplex_server.http_api.time_limit import HEADER

ASKED = {
    "/v1/completions": {"model": "alpha", "prompt": "ab"},
    "/v1/chat/completions": {"model": "alpha", "messages": [{"role": "user", "content": "ab"}]},
}


@pytest.mark.parametrize("path", ASKED)
def test_the_header_is_the_deadline(http: Any, service: Any, path: str) -> None:
    for value, deadline in (("2.5", 2.5), ("60", 60.0), (None, None)):
        headers = {HEADER: value} if value else {}
        assert http.post(path, json=ASKED[path], headers=headers).status_code == 200
        assert service.asked[-1].deadline == deadline


@pytest.mark.parametrize("value", ["", "0", "-1", "soon", "1e9", "nan", "inf", "5s"])
def test_a_strange_value_is_refused(http: Any, value: str) -> None:
    answer = http.post("/v1/completions", json=ASKED["/v1/completions"], headers={HEADER: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == HEADER


def test_the_document_lists_it(http: Any) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    found = {path for path, methods in paths.items() for one in methods.values() if HEADER in str(one)}
    assert found == set(ASKED)
