"""What may stand where a request names its model, when it is more than one adapter."""

from __future__ import annotations

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.service.composed_name import MAX_PARTS, NamedPart, is_composed, parse_composed


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("a+b", [("a", 1), ("b", 1)]),
        ("a*0.7+b*0.3", [("a", 0.7), ("b", 0.3)]),
        ("a * -2 + b.c-d_e", [("a", -2), ("b.c-d_e", 1)]),
        ("a*.5", [("a", 0.5)]),
        ("a*0", [("a", 0)]),
        ("a+a", [("a", 1), ("a", 1)]),
    ],
)
def test_names_and_weights(model: str, parts: list[tuple[str, float]]) -> None:
    assert is_composed(model)
    assert parse_composed(model) == tuple(NamedPart(name, weight) for name, weight in parts)


WRONG = ["+", "a+", "+b", "a++b", "a*", "*2", "a*b", "a*1e9", "a*nan", "a*inf", "a*2*3", "../x+a", "a*--1", "a*٣"]


@pytest.mark.parametrize("model", [*WRONG, "a*" + "9" * 400, "+".join("a" * (MAX_PARTS + 1))])
def test_what_is_no_composition(model: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_composed(model)
    assert refused.value.param == "model" and len(refused.value.message) < 600


def test_an_adapters_own_name_is_none() -> None:
    assert not is_composed("org-name.v1_2")
