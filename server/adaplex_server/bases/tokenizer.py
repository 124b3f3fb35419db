"""Reads a base's tokenizer, the same way for the service's texts and for the engine's grammars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adaplex_adapters.errors import StartupError


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder, through transformers: it knows every layout and converts old ones. Its
    `backend_tokenizer` neither truncates nor pads. Raises StartupError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each one means the same here
        raise StartupError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error}); tokenizer.json is needed"
        ) from error
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(fast, Tokenizer):
        raise StartupError(f"the tokenizer in {folder} has no fast version; add a tokenizer.json")
    # A tokenizer.json may have been saved with either; both would change texts silently.
    fast.no_truncation()
    fast.no_padding()
    return tokenizer
