"""How large the Ray Serve application is: what Ray is asked for, beside the settings of the servers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaplex_adapters.errors import StartupError


class RayShape(BaseModel):
    """replicas: servers, each with the base in memory. cpus, gpus: of each of them, as Ray counts; fractions may be
    given. gateways: processes that read requests and pass them on, of gateway_cpus each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    gateways: int = Field(default=1, ge=1)
    gateway_cpus: float = Field(default=0.5, ge=0)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RayShape:
        """From the words of a command line or a YAML file. Raises StartupError naming the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            raise StartupError(f"'{key}' is {values.get(key)!r}: {first['msg']}", param=key) from error


SHAPE_KEYS = frozenset(RayShape.model_fields)
