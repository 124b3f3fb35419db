"""Families times base formats, with LoRA: rows of two adapters and of none in one batch, in chunks and steps of one
token, against transformers and PEFT on a base of the same quantized weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adaplex_server.model.base import Base, load_base
from adaplex_server.model.batch import NO_ADAPTER
from adaplex_server.model.config import read_config
from adaplex_server.model.decoder import Decoder
from adaplex_server.model.families import linear_targets, module_paths
from adaplex_server.model.formats.quantization import QuantizeKind
from support.matrix import quantize_oracle
from support.sequences import cache_for, pool_of, run, sequences
from support.tiny_models import CPU, save_tiny

MATRIX: list[tuple[str, QuantizeKind]] = [
    ("llama2", "int8"),
    ("llama3", "nf4"),
    ("mistral-window", "fp4"),
    ("qwen2", "int8-absmax"),
    ("qwen3", "int8-zeropoint"),
    ("gemma", "nf4"),
    ("gemma2", "fp4"),
    ("gemma3", "int8"),
    ("phi3", "nf4"),
    ("phi", "int8-absmax"),
    ("gpt_neox", "int8"),
    ("gpt_neox", "nf4"),
    ("opt", "int8"),
    ("opt", "fp4"),
    ("bloom", "int8"),
    ("bloom", "nf4"),
    ("gpt2", "nf4"),
    ("gpt2", "int8"),
    ("falcon-multi-query", "int8-zeropoint"),
    ("falcon-groups", "nf4"),
    ("falcon-groups-one-norm", "none"),
    ("falcon-alibi", "fp4"),
]


def with_adapters(model: PreTrainedModel, base: Base, folder: Path) -> PeftModel:
    """PEFT's model with "lora0" on every linear and "lora1" on the first one's module, saved below `folder`."""
    paths = [path for linear in linear_targets(base.config) for path in module_paths(base.config, 0, linear)]
    names = sorted({path.rpartition(".")[2] for path in paths})
    torch.manual_seed(1)
    every = LoraConfig(r=9, lora_alpha=18, target_modules=names, init_lora_weights=False)
    peft = get_peft_model(model, every, adapter_name="lora0")
    first = LoraConfig(r=2, lora_alpha=6, target_modules=[names[0]], use_rslora=True, init_lora_weights=False)
    peft.add_adapter("lora1", first)
    peft.save_pretrained(str(folder))
    return peft.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("kind", "quantize"), MATRIX)
def test_rows_of_a_mixed_batch_are_pefts(kind: str, quantize: QuantizeKind, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "base", kind)
    base = load_base(
        tmp_path / "base",
        config=read_config(tmp_path / "base"),
        quantize=quantize,
        double_quant=True,
        quant_block=32,
        dtype=torch.float32,
        device=CPU,
    )
    quantize_oracle(model, base, quantize == "int8")
    peft = with_adapters(model, base, tmp_path)
    pool = pool_of(base, [tmp_path / "lora0", tmp_path / "lora1"], [(3, 1), (2,)])
    rows = sequences([40, 9, 23, 12], [0, 1, NO_ADAPTER, 0], seed=4)
    run(Decoder(base, pool, positions=64), cache_for(base, rows), rows, seed=5)
    for row in rows:
        with torch.no_grad():
            if row.slot == NO_ADAPTER:
                with peft.disable_adapter():
                    theirs = peft(torch.tensor([row.tokens])).logits[0]
            else:
                peft.set_adapter(f"lora{row.slot}")
                theirs = peft(torch.tensor([row.tokens])).logits[0]
        ours = torch.cat(row.logits)
        if quantize == "int8":
            # The last bit of an activation may decide its code.
            assert (ours - theirs).norm() < 0.01 * theirs.norm()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)
