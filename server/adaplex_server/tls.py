"""The certificate that HTTP and gRPC both present. Read once, at the start."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from adaplex_adapters.errors import StartupError


@dataclass(frozen=True)
class Certificate:
    """PEM files of the chain and of its key, known to belong together."""

    chain: Path
    key: Path


def read_certificate(chain: Path | None, key: Path | None) -> Certificate | None:
    """None without TLS. Raises StartupError when a file is missing, unreadable or not the other's."""
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise StartupError("TLS needs both files: set --tls-cert and --tls-key", param="tls_cert")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"the certificate {chain} and key {key} cannot be used: {error}", param="tls_cert"
        ) from error
    return Certificate(chain, key)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase")
