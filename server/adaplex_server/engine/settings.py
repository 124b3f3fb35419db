"""What an engine process is started with. Resolved and validated by the API process; the engine only obeys."""

from __future__ import annotations

from typing import Literal

import msgspec

from adaplex_server.model.formats.quantization import BLOCK, THRESHOLD, QuantizeKind

CPU_STEP_TOKENS = 512
GPU_STEP_TOKENS = 4096
"""A large step serves a long prompt faster and keeps the rows that decode beside it waiting for longer. On a GPU each
step reads or dequantizes all of the base, which few tokens do not repay: 64 prompts of 512 tokens take an 8B base on an
H200 1466 ms with 512 tokens a step, 930 with 2048 and 870 with 4096, whose steps last twice as long.
"""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Sent as the first frame to a new engine process.

    base: folder in Hugging Face layout (already local). quantize, double_quant, quant_block, int8_threshold: how a
    dense checkpoint is quantized in flight (`model.formats.quantization`); one that is already quantized is recognized
    from its own config. dtype: of activations;
    "auto" follows the checkpoint (bfloat16 where it is float16 on a CPU). store: folder of the AdapterStore.

    max_rows: rows of one step at most. max_waiting: length of the queue. max_wait: expected seconds in it above which a
    row is refused. max_step_tokens: tokens of one step at most (a longer prompt is prefilled in chunks); None for what
    suits the device (`with_step_tokens`). batch_invariant: a row's logits have the same bits alone or mixed, however
    its prompt is cut, and after a preemption; a CPU keeps to that always, a GPU by small steps. max_context: None for
    the model's own. kv_bytes, adapter_bytes: device memory for KV pages and for adapter rank rows; None takes a share
    of what is free. reserved_bytes: left free beside that, for a trainer. host_adapter_bytes: adapters kept in host
    memory. max_head_bytes: device memory of an adapter's own embedding and head at most, beside adapter_bytes.
    max_rank: rank of an adapter at most. threads: CPU threads of the model, None for all cores. decode_graphs: on a
    GPU, replay decode steps as CUDA graphs; they change no number and cost memory and a few seconds at start. overlap:
    launch a step before the host knows what the one before it chose, so that the device does not wait for the host;
    None on a GPU. It changes no number. weight_cache: folder in which the weights are kept as a GPU has them, None for
    nowhere.
    """

    base: str
    store: str
    base_name: str
    quantize: QuantizeKind = "nf4"
    double_quant: bool = True
    quant_block: int = BLOCK
    int8_threshold: float = THRESHOLD
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_rows: int = 64
    max_waiting: int = 256
    max_wait: float | None = None
    max_step_tokens: int | None = None
    batch_invariant: bool = False
    max_context: int | None = None
    page_size: int = 16
    kv_bytes: int | None = None
    adapter_bytes: int | None = None
    reserved_bytes: int = 0
    host_adapter_bytes: int = 2 << 30
    max_head_bytes: int = 256 << 20
    max_slots: int = 64
    max_rank: int = 256
    prefix_cache: bool = True
    threads: int | None = None
    decode_graphs: bool = True
    overlap: bool | None = None
    weight_cache: str | None = None


def with_step_tokens(settings: EngineSettings, on_gpu: bool) -> EngineSettings:
    """The settings with a number of tokens a step."""
    tokens = settings.max_step_tokens or (GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS)
    if settings.batch_invariant and on_gpu:
        # Imports torch, which the process that makes the settings does without.
        from adaplex_server.kernels.lora_tiles import FEW_TOKENS

        # More tokens are multiplied by cuBLAS, whose order of sums follows from how many there are.
        tokens = min(tokens, FEW_TOKENS)
    return msgspec.structs.replace(settings, max_step_tokens=tokens)
