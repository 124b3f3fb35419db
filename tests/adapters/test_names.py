from __future__ import annotations

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.names import check_name


@pytest.mark.parametrize("name", ["a", "itn-en", "team.model_v2", "0", "A" * 96])
def test_accepts(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-option",
        "_a",
        "a/b",
        "a\\b",
        "a..b",
        "../a",
        "a b",
        "a\n",
        "a\0",
        "A" * 97,
        "ａ",
        "а",
        "é",
        "a:b",
        "a%2e",
        None,
        7,
        b"a",
        "x" * 10**4,
    ],
)
def test_refuses(name: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_name(name)
    assert caught.value.param == "name"
    assert len(caught.value.message) < 400 and caught.value.message.isprintable()
