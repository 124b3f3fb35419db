"""Making an adapter from a file of examples, on the quantized base that serves it.

The way of a file: `conversations` (JSONL to examples) -> `split` -> `encoding` (tokens and the mask of the answer) ->
`batches` -> `loop` over a `frozen_base` with fresh LoRA weights -> `result` (a PEFT folder).
`trainer` is the one place that calls them in order; registering the result is the command line's business.
"""
