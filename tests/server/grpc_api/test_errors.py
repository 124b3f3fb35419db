"""Every error of the tree has a wire form that a client can act on."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2, error_details_pb2

from adaplex_adapters.errors import AdaplexError, InvalidRequest, Overloaded, StartupError, all_errors
from adaplex_server.grpc_api.errors import status_of


@pytest.mark.parametrize("kind", [e for e in all_errors() if e is not StartupError], ids=lambda e: e.__name__)
def test_each_error_has_a_code_and_a_reason(kind: type[AdaplexError]) -> None:
    status = status_of(kind("what was wrong"))
    assert status.message == "what was wrong"
    assert status.code != code_pb2.OK
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "adaplex"
    assert info.reason


def test_overload_carries_its_retry_hint() -> None:
    status = status_of(Overloaded("full", retry_after=1.5))
    retry = error_details_pb2.RetryInfo()
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert status.details[-1].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5


def test_a_bad_field_is_named() -> None:
    status = status_of(InvalidRequest("temperature is -1", param="temperature"))
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "temperature"
