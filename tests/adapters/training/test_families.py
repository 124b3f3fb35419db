"""Bases of other families, fused or with logits of their own: the loss is that of their full logits, and PEFT reads
what was trained on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.reader import read_unfitted
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.frozen_base import load_frozen_base
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.trainer import train_adapter
from support.quiet_progress import Quiet

ROWS = tuple(Completion(i + 1, f"{i} and {i} is", f" {2 * i}") for i in range(24))
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_neox": (
        {**SMALL, "intermediate_size": 64, "rotary_pct": 0.5},
        {"targets": ("query_key_value",), "alpha": 32.0},
    ),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, {"targets": ("query_key_value", "dense")}),
    "opt": ({**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, {}),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, {"targets": ("c_attn",)}),
    "gemma2": ({**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}, {}),
    "qwen2": ({**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}, {"method": "ia3"}),
    "qwen3": ({**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}, {"method": "bottleneck"}),
    "mistral": ({**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}, {"method": "bottleneck"}),
}


def make(folder: Path, family: str, tokenizer: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.1, **FAMILIES[family][0])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_and_measured_as_peft_measures_it(family: str, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    from adaplex_adapters.training.batches import pad_batch
    from adaplex_adapters.training.rows import prepare_rows

    quantize = "none" if family == "gpt2" else "auto"
    options = TrainOptions(
        **{"batch_size": 8, "max_steps": 5, "held_out": 0.2, "rank": 4, "quantize": quantize, **FAMILIES[family][1]}
    )
    base = load_frozen_base(make(tmp_path / "base", family, tokenizer), family, "cpu", options)
    result = train_adapter(ROWS, base, tmp_path / "out", options, Quiet())
    assert result.held_out_before is not None and result.held_out_after is not None
    assert result.held_out_after < result.held_out_before
    if options.method == "bottleneck":
        assert len(read_unfitted(tmp_path / "out").bottlenecks) == 2
        return
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "out")).eval()
    batch = pad_batch(prepare_rows(ROWS, base.tokenizer, options).held_out, 2)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten())
    assert float(loss) == pytest.approx(result.held_out_after, rel=1e-2)
