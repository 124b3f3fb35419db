"""Splits a multipart/form-data body into parts while it arrives; nothing of it is kept here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adaplex_adapters.errors import InvalidRequest

MAX_PART_HEADERS = 16
MAX_PART_HEADER_BYTES = 4096


@dataclass(frozen=True)
class PartBegin:
    """A part begins: its field, and its file name if it is a file."""

    field: str
    filename: str | None


@dataclass(frozen=True)
class PartData:
    """Some bytes of the present part."""

    data: bytes


@dataclass(frozen=True)
class PartEnd:
    """The present part is complete."""


PartEvent = PartBegin | PartData | PartEnd


class _Splitter:
    """Collects what the parser found in one chunk."""

    def __init__(self, boundary: bytes) -> None:
        self.events: list[PartEvent] = []
        self.complete = False
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._value = b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": lambda data, start, end: self.events.append(PartData(data[start:end])),
                "on_part_end": lambda: self.events.append(PartEnd()),
                "on_end": self._on_end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_PART_HEADER_BYTES,
        )

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("Each part needs 'Content-Disposition: form-data' with a name.")
        filename = options.get(b"filename")
        self.events.append(PartBegin(_text(options[b"name"]), None if filename is None else _text(filename)))

    def _on_end(self) -> None:
        self.complete = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("A name in the multipart body is not UTF-8.") from None


async def split_parts(content_type: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[PartEvent]:
    """The parts as they arrive. Raises InvalidRequest if the body is not complete multipart/form-data."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(
            "The body must be multipart/form-data with a text 'name' and one part 'files' per file of the adapter."
        )
    try:
        splitter = _Splitter(options[b"boundary"])
        async for chunk in chunks:
            splitter.parser.write(chunk)
            for one in splitter.events:
                yield one
            splitter.events.clear()
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body is malformed: {error}.") from None
    if not splitter.complete:
        raise InvalidRequest("The multipart body ends in the middle; send all of it.")
