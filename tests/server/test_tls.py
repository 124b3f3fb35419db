"""A certificate is read once; HTTPS and gRPC over TLS are in tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.tls import read_certificate


def test_no_files_is_no_tls() -> None:
    assert read_certificate(None, None) is None


def test_half_a_pair_and_nonsense_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pem"
    file.write_text("no certificate")
    for pair in ((file, None), (None, file), (file, file), (tmp_path / "missing", file)):
        with pytest.raises(StartupError):
            read_certificate(*pair)
