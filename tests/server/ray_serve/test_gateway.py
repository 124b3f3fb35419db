from __future__ import annotations

import pytest

from adaplex_adapters.errors import InvalidRequest, NotFound, StartupError
from adaplex_server.ray_serve.gateway import GENERATING, READ, _check
from adaplex_server.ray_serve.shape import RayShape
from adaplex_server.service.access.policy import POLICY


@pytest.mark.parametrize("route", [route for route in POLICY if " " in route])
def test_only_what_changes_nothing_passes(route: str) -> None:
    method, path = route.split(" ")
    if path in GENERATING or (method == "GET" and path.startswith(READ)):
        _check(method, path)
    else:
        with pytest.raises((InvalidRequest, NotFound)):
            _check(method, path)


def test_the_shape_comes_from_words() -> None:
    assert RayShape.of({"replicas": "2", "gpus": "0.5"}) == RayShape(replicas=2, gpus=0.5)
    with pytest.raises(StartupError, match=r"'replicas' is '0'"):
        RayShape.of({"replicas": "0"})
