"""Merging a demo adapter into the embedded base, against PEFT on the same quantized base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaplex_server.bases.embedded import ensure_embedded
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.cli.merge import merge_command
from support.in_float32 import in_float32


@pytest.mark.slow
@torch.no_grad()
def test_the_merged_demo_answers_as_peft_does(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ensure_embedded(None)
    merge_command("itn-en", out=tmp_path / "merged", dtype="float32", data_dir=tmp_path / "none")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    dense = in_float32(AutoModelForCausalLM.from_pretrained(base))
    peft = PeftModel.from_pretrained(dense, str(demo_adapters()["itn-en"])).eval()
    chat = [{"role": "user", "content": "Write the numbers as digits: it costs twelve dollars and fifty cents"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    wanted, found = peft(input_ids=ids).logits, merged(input_ids=ids).logits
    # Float32 sums in another order, through thirty layers: 1.2e-4 was seen on logits of up to 38.
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    settings = {"max_new_tokens": 16, "do_sample": False}
    texts = [
        tokenizer.decode(m.generate(input_ids=ids, **settings)[0, ids.shape[1] :], skip_special_tokens=True)
        for m in (peft, merged)
    ]
    assert texts[0] == texts[1] and "$12.50" in texts[1]
