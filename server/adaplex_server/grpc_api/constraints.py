"""What a message says that an answer must be. Pure functions; the rules are the service's."""

from __future__ import annotations

import json

from adaplex_adapters.errors import InvalidRequest
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_server.service.constraints import ANY_OBJECT, grammar, one_of
from adaplex_server.vocabulary import Constraint


def constraint_of(request: pb.GenerateRequest) -> Constraint | None:
    """None for any text. Raises InvalidRequest."""
    if not request.HasField("constraint"):
        return None
    told = request.constraint
    try:
        match told.WhichOneof("kind"):
            case "json_schema":
                return Constraint("json", _schema(told.json_schema))
            case "json_object":
                return ANY_OBJECT
            case "regex":
                return Constraint("regex", told.regex)
            case "choice":
                return one_of(tuple(told.choice.texts))
            case "grammar":
                return grammar(told.grammar)
    except ValueError as error:
        raise InvalidRequest(f"constraint {error}", param="constraint") from None
    raise InvalidRequest("the constraint holds none of its kinds; set one or leave it out", param="constraint")


def _schema(text: str) -> str:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be a JSON schema: {error}") from None
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    return text
