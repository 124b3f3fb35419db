"""The one table of what each route needs, HTTP and gRPC alike. What is not in it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from adaplex_server.caller import Verb

Need = Verb | Literal["nothing"]

POLICY: Mapping[str, Need] = {
    "POST /v1/chat/completions": "generate",
    "POST /v1/completions": "generate",
    "GET /v1/models": "generate",
    "GET /v1/models/{model:path}": "generate",
    "DELETE /v1/models/{model:path}": "adapters",
    "GET /v1/adapters": "observe",
    "GET /v1/adapters/{name:path}": "observe",
    "POST /v1/adapters": "adapters",
    "DELETE /v1/adapters/{name:path}": "adapters",
    "POST /v1/load_lora_adapter": "adapters",
    "POST /v1/unload_lora_adapter": "adapters",
    "GET /v1/files": "train",
    "POST /v1/files": "train",
    "GET /v1/files/{file_id}": "train",
    "DELETE /v1/files/{file_id}": "train",
    "GET /v1/files/{file_id}/content": "train",
    "GET /v1/fine_tuning/jobs": "train",
    "POST /v1/fine_tuning/jobs": "train",
    "GET /v1/fine_tuning/jobs/{job_id}": "train",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": "train",
    "POST /v1/fine_tuning/jobs/{job_id}/pause": "train",
    "POST /v1/fine_tuning/jobs/{job_id}/resume": "train",
    "GET /v1/fine_tuning/jobs/{job_id}/events": "train",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": "train",
    "GET /metrics": "observe",
    "GET /": "nothing",
    "GET /console/{asset}": "nothing",
    "GET /health": "nothing",
    "GET /ready": "nothing",
    "GET /version": "nothing",
    "GET /openapi.json": "nothing",
    "/adaplex.v1.Inference/Generate": "generate",
    "/adaplex.v1.Inference/ListModels": "generate",
    "/adaplex.v1.Adapters/List": "observe",
    "/adaplex.v1.Adapters/Describe": "observe",
    "/adaplex.v1.Adapters/Load": "adapters",
    "/adaplex.v1.Adapters/Compose": "adapters",
    "/adaplex.v1.Adapters/Unload": "adapters",
    "/adaplex.v1.FineTuning/UploadFile": "train",
    "/adaplex.v1.FineTuning/CreateJob": "train",
    "/adaplex.v1.FineTuning/ListJobs": "train",
    "/adaplex.v1.FineTuning/GetJob": "train",
    "/adaplex.v1.FineTuning/CancelJob": "train",
    "/adaplex.v1.FineTuning/PauseJob": "train",
    "/adaplex.v1.FineTuning/ResumeJob": "train",
    "/adaplex.v1.FineTuning/WatchJob": "train",
    "/grpc.health.v1.Health/Check": "nothing",
    "/grpc.health.v1.Health/List": "nothing",
    "/grpc.health.v1.Health/Watch": "nothing",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "nothing",
}
"""HTTP routes as `METHOD path`, gRPC methods by their full name."""
