"""The same work by Hugging Face transformers and PEFT, for the ratio beside our own figure.

Greedy decoding of equal-length rows on the same NF4 base: `generate` of the base alone, and PEFT's mixed batch
(`adapter_names`). Needs the extras `train` (peft, bitsandbytes).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class PeftWorkload:
    """Owns a transformers model with its adapters loaded by PEFT."""

    def __init__(self, base: Path, adapters: Sequence[Path], device: str, threads: int) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map=device)
        self.base = model.eval()
        self.names = [f"adapter{i}" for i in range(len(adapters))]
        self.mixed: Any = None
        if adapters:
            self.mixed = PeftModel.from_pretrained(model, adapters[0], adapter_name=self.names[0])
            for name, folder in zip(self.names[1:], adapters[1:], strict=True):
                self.mixed.load_adapter(folder, adapter_name=name)
            self.mixed.eval()

    @torch.inference_mode()
    def tokens_per_second(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, mixed: bool) -> float:
        """Generated tokens of all rows a second, prefill included. prompts: of equal length."""
        ids = torch.tensor(prompts, device=self.device)
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
        }
        if mixed:
            options["adapter_names"] = [self.names[i % len(self.names)] for i in range(len(prompts))]
        model = self.mixed if mixed else self.base
        began = time.perf_counter()
        if mixed or self.mixed is None:
            model.generate(**options)
        else:
            with self.mixed.disable_adapter():
                self.mixed.generate(**options)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return len(prompts) * new_tokens / (time.perf_counter() - began)
