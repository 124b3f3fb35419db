"""The normalized form is still a PEFT folder: PEFT and our reader take the same adapter from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.peft_folder import files_of
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.spec import KIND_LORA, Adapter, AdapterSpec, LoraModule


def write(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    for name, pieces in files_of(adapter):
        (folder / name).write_bytes(b"".join(pieces))
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "mixed": {
        "r": 4,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 2},
        "alpha_pattern": {"down_proj": 0.3, "k_proj": -1},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_it_back(variant: str, tiny_llama: Any, shape_of: Any, save_peft: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    model = tiny_llama()
    shape = shape_of(model)
    folder, _ = save_peft(model, LoraConfig(**VARIANTS[variant]))
    adapter = read_adapter(folder, shape)
    normalized = write(adapter, tmp_path / "normalized")
    again = read_adapter(normalized, shape)
    assert again.spec == adapter.spec
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_llama(), folder)(ids).logits
        found = PeftModel.from_pretrained(tiny_llama(), normalized)(ids).logits
        plain = tiny_llama()(ids).logits
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-2)


scalings = st.floats(-1e9, 1e9, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 256), scalings), min_size=1, max_size=4))
def test_scalings_come_back_to_the_last_bit(tmp_path_factory: Any, kinds: list[tuple[int, float]]) -> None:
    linears = list(zip([f"model.layers.{n}.q" for n in range(4)], kinds, strict=False))
    modules = {path: LoraModule(torch.ones(r, 2), torch.ones(3, r), scaling) for path, (r, scaling) in linears}
    spec = AdapterSpec("", KIND_LORA, 1, ("q",), 1, 1, "")
    from adaplex_adapters.base_shape import LinearShape

    base = BaseShape("b", "llama", 4, 2, 8, {path: LinearShape(3, 2) for path in modules})
    folder = tmp_path_factory.mktemp("scalings") / "x"
    found = read_adapter(write(Adapter(spec, modules), folder), base)
    for path, (r, scaling) in linears:
        assert found.modules[path].scaling == float(np.float32(scaling)) == scaling
        assert found.modules[path].a.shape[0] == r


def test_the_usual_config_is_plain(write_lora: Any, base: BaseShape) -> None:
    adapter = read_adapter(write_lora(config={"lora_alpha": 16, "use_rslora": True}), base)
    text = b"".join(dict(files_of(adapter))["adapter_config.json"]).decode()
    assert '"rank_pattern": {}' in text and '"alpha_pattern": {}' in text and '"lora_alpha": 32' in text
