"""API keys: what they look like and how they are kept.

A key is `adx_<id>_<secret>`: the id (12 hex digits) is public and names the key in lists and logs; the secret has 256
random bits, so its plain SHA-256 is all that needs to be kept, and no slow hash is in the way of a request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from adaplex_server.caller import Caller

_KEY = re.compile(r"adx_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class KeyRecord:
    """A key as kept: everything but the secret. created, expires: seconds since 1970."""

    caller: Caller
    digest: bytes
    created: float
    expires: float | None = None
    revoked: bool = False

    def usable(self, now: float) -> bool:
        return not self.revoked and (self.expires is None or now < self.expires)

    def fits(self, secret: str) -> bool:
        """Whether this is its secret, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(_digest(secret), self.digest)


def new_key() -> tuple[str, str, bytes]:
    """A fresh key: what its owner is shown once, its id, and the digest to keep."""
    public, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return f"adx_{public}_{secret}", public, _digest(secret)


def split_key(key: str) -> tuple[str, str] | None:
    """id and secret of something that looks like a key."""
    found = _KEY.fullmatch(key)
    return None if found is None else (found[1], found[2])


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
