"""Requests and answers about models, adapters and the server itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct
from pydantic import Field

from adaplex_server.http_api.schemas.fields import Only, RequestModel
from adaplex_server.service.composed_name import MAX_PARTS

# ---- /v1/models ------------------------------------------------------------------------------------------------------


class Model(Struct, frozen=True):
    """Something that `model` may name. parent: null for the base, the base's name for an adapter.

    revision: of an adapter, the SHA-256 of its content. max_model_len: tokens of prompt and answer together, null while
    the base is loading.
    """

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    revision: str | None = None
    object: Literal["model"] = "model"
    owned_by: str = "adaplex"


class ModelList(Struct, frozen=True):
    """The base, its other names, then the adapters."""

    data: list[Model]
    object: Literal["list"] = "list"


class ModelDeleted(Struct, frozen=True):
    """Answer to DELETE of an adapter under /v1/models."""

    id: str
    deleted: bool = True
    object: Literal["model"] = "model"


# ---- /v1/adapters ----------------------------------------------------------------------------------------------------


class ComposePart(RequestModel):
    """One adapter of a composition. weight: what its low-rank additions are multiplied with; other kinds have none."""

    adapter: str = Field(max_length=1000)
    weight: float = 1.0


class ComposeRequest(RequestModel):
    """Several adapters as one, under a name of its own. It stays what it is now when one of them is loaded again."""

    name: str = Field(max_length=1000)
    compose: list[ComposePart] = Field(min_length=1, max_length=MAX_PARTS)


class AdapterPart(Struct, frozen=True):
    """One adapter of which a composition was made, with the revision that it had then."""

    adapter: str
    weight: float
    revision: str


class AdapterOrigin(Struct, frozen=True):
    """The fine-tuning job that made an adapter, the file that it learned from, and the base that it was made for."""

    job: str
    training_file: str
    training_file_sha256: str | None
    base: str


class Adapter(Struct, frozen=True):
    """A registered adapter. size: bytes as stored. running: rows in the engine now. reason: why it is not served.
    virtual_tokens: of a soft prompt or prefix; they count towards the context. bottleneck_size: width of bottlenecks.
    parts: what a composition was made of. origin: of one that was trained here, told where one adapter is described.
    """

    name: str
    revision: str
    kind: str
    rank: int
    targets: list[str]
    size: int
    parameters: int
    base_model: str
    source: str
    created: int
    state: Literal["ready", "resident", "loading", "draining", "failed"]
    running: int
    reason: str
    virtual_tokens: int = 0
    bottleneck_size: int = 0
    parts: list[AdapterPart] = []
    origin: AdapterOrigin | None = None
    object: Literal["adapter"] = "adapter"


class AdapterList(Struct, frozen=True):
    """Every registered adapter, by name."""

    data: list[Adapter]
    object: Literal["list"] = "list"


class AdapterDeleted(Struct, frozen=True):
    """The name is gone; its last rows may still be running."""

    name: str
    deleted: bool = True
    object: Literal["adapter"] = "adapter"


# ---- /v1/load_lora_adapter -------------------------------------------------------------------------------------------


class LoadLoraRequest(RequestModel):
    """As vLLM's clients send it. lora_path: inside the server's adapter folder."""

    lora_name: str = Field(max_length=1000)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool | None = Field(None, description="Replace an adapter of this name; without it that is an error.")
    base_model_name: str | None = Field(None, description="If sent, it must be the base of this server.")
    is_3d_lora_weight: Annotated[Any, Only(False)] = None


class UnloadLoraRequest(RequestModel):
    """As vLLM's clients send it."""

    lora_name: str = Field(max_length=1000)
    lora_int_id: int | None = Field(None, description="vLLM's own number of the adapter; the name decides here.")


# ---- the server ------------------------------------------------------------------------------------------------------


class Health(Struct, frozen=True):
    """state: "starting", "ready", "draining" or "failed"; detail says why; progress is that of loading, 0 to 1."""

    status: Literal["ok", "unavailable"]
    state: str
    detail: str
    progress: float


class Version(Struct, frozen=True):
    """The version of this server."""

    version: str
