"""OpenAI-compatible HTTP, a thin skin over service."""
