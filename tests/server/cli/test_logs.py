"""Lines for people and lines for machines."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import copy_context

import pytest

from adaplex_server.cli.logs import FIELDS, JsonLines, LogFormat, TextLines, set_up_logs
from adaplex_server.request_scope import open_scope

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def written(form: LogFormat, root: logging.Logger, monkeypatch: pytest.MonkeyPatch, scoped: bool = False) -> str:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)

    def log() -> None:
        set_up_logs("info", form)
        if scoped:
            open_scope("r1", f"00-{TRACE}-00f067aa0ba902b7-01")
        logger = logging.getLogger("adaplex.test")
        logger.info("first\nsecond %s", 5)
        logger.debug("unseen")
        logger.info("%s", "{}", extra={FIELDS: {"path": "/v1", "status": 200}})
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("broke")

    copy_context().run(log)
    return out.getvalue()


def test_json(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    first, access, broke = map(json.loads, written("json", root, monkeypatch, scoped=True).splitlines())
    assert first["message"] == "first\nsecond 5" and first["level"] == "info" and first["logger"] == "adaplex.test"
    assert first["time"].endswith("+00:00")
    assert all((line["request_id"], line["trace_id"]) == ("r1", TRACE) for line in (first, access, broke))
    assert (access["path"], access["status"]) == ("/v1", 200) and "message" not in access
    assert "ValueError: why" in broke["exception"]


def test_text(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written("text", root, monkeypatch, scoped=True)
    assert f"INFO adaplex.test: first\nsecond 5 [r1 trace {TRACE}]" in text
    assert "INFO adaplex.test: {}\n" in text and "unseen" not in text
    alone = written("text", root, monkeypatch)
    assert "second 5\n" in alone and "ValueError: why" in alone


def test_formatters_need_no_request() -> None:
    record = logging.LogRecord("a", logging.INFO, __file__, 1, "hello", (), None)
    assert json.loads(copy_context().run(JsonLines().format, record))["message"] == "hello"
    assert TextLines().format(record).endswith("INFO a: hello")
