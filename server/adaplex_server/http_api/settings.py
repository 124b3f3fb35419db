"""What the HTTP skin can be told; built once by the composition root and never changed."""

from __future__ import annotations

from dataclasses import dataclass

from adaplex_server.tls import Certificate


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Limits in bytes, times in seconds.

    max_body_bytes: of a JSON body. max_upload_bytes: of a whole multipart upload of an adapter. max_header_bytes: of a
    request's head. max_prompts: prompts in one completions request. batch_width: how many of them are under way at
    once, so that a long batch does not fill the queue by itself. first_byte_patience: how long an error can still
    become an HTTP status; after that a stream is opened and errors are told inside it. ping: between comment lines on a
    stream. stall: a reader that stays behind for this long is dropped. body_idle: a body that stops arriving for this
    long is refused. header: for a request's head to arrive. keep_alive: an idle connection. drain: for running answers
    after `stop`. tls: answer by HTTPS alone.
    """

    max_body_bytes: int = 8 << 20
    max_upload_bytes: int = 2 << 30
    max_header_bytes: int = 64 << 10
    max_prompts: int = 1024
    batch_width: int = 32
    first_byte_patience: float = 10.0
    ping: float = 15.0
    stall: float = 30.0
    body_idle: float = 30.0
    header: float = 30.0
    keep_alive: int = 75
    drain: float = 30.0
    tls: Certificate | None = None
