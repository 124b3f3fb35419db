"""What the gRPC messages tell is all that the service tells."""

from __future__ import annotations

from dataclasses import fields

from adaplex_adapters.catalogue import Lineage
from adaplex_server.grpc_api.translate import adapter_message
from adaplex_server.service.types import AdapterInfo

INFO = AdapterInfo(
    name="both",
    revision="ab" * 32,
    kind="composition",
    rank=8,
    targets=("q_proj", "v_proj"),
    nbytes=1000,
    parameters=500,
    base_model="org/base",
    source="composition",
    created=1.5,
    state="ready",
    running=2,
    reason="why",
    virtual_tokens=20,
    bottleneck_size=48,
    parts=(Lineage("a", 0.5, "cd" * 32), Lineage("b", 1.0, "ef" * 32)),
)


def test_an_adapter_is_told_in_full() -> None:
    message = adapter_message(INFO)
    renamed = {"nbytes": "size_bytes"}
    for field in fields(INFO):
        told, known = getattr(message, renamed.get(field.name, field.name)), getattr(INFO, field.name)
        if field.name == "parts":
            assert [(one.adapter, one.weight, one.revision) for one in told] == [
                (one.name, one.weight, one.revision) for one in known
            ]
        else:
            assert known and (tuple(told) if field.name == "targets" else told) == known
