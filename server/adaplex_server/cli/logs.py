"""How the server's log lines look: text for people, or one JSON object a line for machines. Neither holds prompts.

Lines that belong to a request have its id and its trace's.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from adaplex_server.request_scope import current_scope

LogFormat = Literal["text", "json"]
FIELDS = "fields"
"""The attribute of a record (`extra={FIELDS: {...}}`) whose entries are fields of the JSON line."""


def set_up_logs(level: str, form: LogFormat) -> None:
    """Of the whole process, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """Time, level, logger, message; then the request's id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Without the trace of an exception, which comes after it."""
        text = super().formatMessage(record)
        scope = current_scope()
        if scope is None or hasattr(record, FIELDS):
            return text
        return f"{text} [{scope.request_id}{' trace ' + scope.trace_id if scope.trace_id else ''}]"


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, request_id, trace_id, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Control characters are escaped, so a line is always one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        scope = current_scope()
        if scope is not None:
            line["request_id"] = scope.request_id
            if scope.trace_id:
                line["trace_id"] = scope.trace_id
        fields = getattr(record, FIELDS, None)
        if fields is None:
            line["message"] = record.getMessage()
        else:
            line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
