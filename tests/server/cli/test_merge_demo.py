"""Merging a demo adapter into the embedded base, against PEFT on the same quantized base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_server.bases.embedded import NAME, ensure_embedded
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.merge import merge_command

PHRASES = (
    "it costs twelve dollars and fifty cents",
    "back in nineteen eighty four",
)


def peft_in_float32(base: Path, adapter: Path) -> Any:
    """PEFT over the base's exact dequantized values."""
    import bitsandbytes
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = torch.float32
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            model.set_submodule(path, dense)
    return PeftModel.from_pretrained(torch.nn.Module.float(model), str(adapter)).eval()


@pytest.mark.slow
@torch.no_grad()
def test_the_merged_demo_answers_as_peft_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ensure_embedded(None)
    merge_command("itn-en", out=tmp_path / "merged", dtype="float32", data_dir=tmp_path / "none")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    peft = peft_in_float32(base, demo_adapters()["itn-en"])
    for phrase in PHRASES:
        chat = [{"role": "user", "content": f"Write the numbers as digits: {phrase}"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        wanted, found = peft(input_ids=ids).logits, merged(input_ids=ids).logits
        worst = float((found - wanted).abs().max())
        # Float32 sums in another order, through thirty layers: 1.2e-4 was seen on logits of up to 38.
        assert worst < 1e-5 * float(wanted.abs().max())
        settings = {"max_new_tokens": 16, "do_sample": False}
        texts = [
            tokenizer.decode(m.generate(input_ids=ids, **settings)[0, ids.shape[1] :], skip_special_tokens=True)
            for m in (peft, merged)
        ]
        assert texts[0] == texts[1]
        assert any(c.isdigit() for c in texts[1]), (phrase, texts[1], NAME)
