"""How an answer's text is constrained: OpenAI's response_format, and vLLM's structured_outputs with its older names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from adaplex_server.http_api.schemas.fields import ConflictingFields, Only, RequestModel
from adaplex_server.service.constraints import ANY_OBJECT, grammar, one_of
from adaplex_server.vocabulary import Constraint


def _schema_text(value: Any) -> str | None:
    """A JSON schema, as an object or as text, to text."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"must be a JSON schema: {error}") from None
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise ValueError("is nested too deeply") from None


def _choices(value: Any) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("must be a list of strings that are not empty")
    return one_of(value)


def _grammar(value: Any) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return grammar(value)


_ANY_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
Schema = Annotated[Any, BeforeValidator(_schema_text), WithJsonSchema(_ANY_SCHEMA)]
Choices = Annotated[
    Any,
    BeforeValidator(_choices),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "null"}]}),
]
Grammar = Annotated[Any, BeforeValidator(_grammar), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})]


class JsonSchema(RequestModel):
    """A schema that the whole answer fulfils. Every answer does, whatever `strict` says."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: Schema = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's: any text, any JSON object, or JSON that fulfils a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ConflictingFields("json_schema", "goes with type 'json_schema', and only with it")
        return self

    def constraints(self) -> list[Constraint]:
        """Nothing for plain text."""
        if self.type == "text":
            return []
        schema = self.json_schema and self.json_schema.json_schema
        return [Constraint("json", schema) if schema else ANY_OBJECT]


class StructuredOutputs(RequestModel):
    """vLLM's name for the same, with more kinds. One of them at a time."""

    json_schema: Schema = Field(None, alias="json")
    regex: str | None = None
    choice: Choices = None
    grammar: Grammar = Field(None, description="Lark as llguidance reads it, or GBNF.")
    json_object: bool | None = None
    structural_tag: Annotated[Any, Only()] = None
    disable_fallback: Annotated[Any, Only(True, False)] = None
    disable_any_whitespace: Annotated[Any, Only(False)] = None
    disable_additional_properties: Annotated[Any, Only(False)] = None
    whitespace_pattern: Annotated[Any, Only()] = None

    def constraints(self) -> list[Constraint]:
        """All that are asked for."""
        found = _constraints(self.json_schema, self.regex, self.choice, self.grammar)
        return [*found, ANY_OBJECT] if self.json_object else found


def _constraints(
    schema: str | None, regex: str | None, choice: Constraint | None, lark: Constraint | None
) -> list[Constraint]:
    found = [Constraint("json", schema)] if schema is not None else []
    if regex is not None:
        found.append(Constraint("regex", regex))
    return [*found, *(one for one in (choice, lark) if one is not None)]


class ConstraintFields(RequestModel):
    """All fields that constrain an answer; at most one may be used."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Choices = None
    guided_grammar: Grammar = None

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be. Raises ConflictingFields if it must be several things."""
        found = [
            one for field in (self.response_format, self.structured_outputs) if field for one in field.constraints()
        ]
        found += _constraints(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if len(found) > 1:
            raise ConflictingFields("response_format", "and its other names can be used only once in a request")
        return found[0] if found else None
