"""Merging an adapter into its base: a standalone checkpoint with no trace of quantization or of LoRA.

Plan, validate, apply: `plan` says what becomes of every tensor before any is read, `merge` applies it tensor by tensor,
`writer` keeps the result under a temporary name until it is whole. Where the base's values come from is the caller's
business (`source`).
"""
