"""Each method, trained a few steps on the tiny base: PEFT reads what was saved and measures what was told, and the
base is left as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.training.answer_loss import base_loss, causal_loss
from adaplex_adapters.training.batches import Batch, pad_batch
from adaplex_adapters.training.conversations import Completion
from adaplex_adapters.training.encoding import EncodedExample, encode_example
from adaplex_adapters.training.frozen_base import FrozenBase, load_frozen_base
from adaplex_adapters.training.methods.adapter import ModelInputs
from adaplex_adapters.training.methods.attach import attach_adapter
from adaplex_adapters.training.methods.peft_adapter import PeftAdapter
from adaplex_adapters.training.options import TrainOptions
from adaplex_adapters.training.trainer import train_adapter
from support.quiet_progress import Quiet

CPU = torch.device("cpu")
ROWS = tuple(Completion(i + 1, f"{i} and {i} is", f" {2 * i}") for i in range(24))
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "rank": 4},
    "dora": {"dora": True},
    "pissa": {"init": "pissa", "rank": 4},
    "loftq": {"init": "loftq", "rank": 4},
    "gaussian": {"init": "gaussian"},
    "ia3": {"method": "ia3"},
    "ia3 targets": {"method": "ia3", "targets": ("q_proj", "down_proj"), "feedforward_targets": ("down_proj",)},
    "prompt": {"method": "prompt_tuning", "virtual_tokens": 5},
    "p-tuning": {"method": "p_tuning", "virtual_tokens": 5, "encoder_hidden_size": 16},
    "prefix": {"method": "prefix_tuning", "virtual_tokens": 5},
    "projected prefix": {"method": "prefix_tuning", "virtual_tokens": 5, "prefix_projection": True},
}
BOTTLENECKS = {
    "pfeiffer": {"method": "bottleneck", "reduction_factor": 8},
    "houlsby": {"method": "bottleneck", "bottleneck_place": "houlsby", "dropout": 0.1},
}


def options(**given: Any) -> TrainOptions:
    return TrainOptions(**{"batch_size": 8, "max_steps": 6, "held_out": 0.2, "rank": 2, **given})


@pytest.fixture(scope="module")
def base(base_folder: Path) -> FrozenBase:
    return load_frozen_base(base_folder, "tiny", "cpu")


def weights(base: FrozenBase) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def held_out(base: FrozenBase, given: TrainOptions) -> Batch:
    from adaplex_adapters.training.rows import prepare_rows

    return pad_batch(prepare_rows(ROWS, base.tokenizer, given).held_out, 2)


@pytest.mark.parametrize("name", METHODS)
def test_peft_measures_the_saved_adapter_as_the_trainer_did(name: str, base: FrozenBase, tmp_path: Path) -> None:
    from peft import PeftModel

    given, before = options(**METHODS[name]), weights(base)
    result = train_adapter(ROWS, base, tmp_path / "out", given, Quiet())
    after = weights(base)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert result.held_out_before is not None and result.held_out_after is not None
    assert result.loss_last < result.loss_first

    model = PeftModel.from_pretrained(base.model, str(tmp_path / "out")).eval()
    batch = held_out(base, given)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, -batch.ids.shape[1] : -1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten())
    PeftAdapter(model).detach()
    assert read_adapter(tmp_path / "out", served_shape(base)).spec.base_model == "tiny"
    assert float(loss) == pytest.approx(result.held_out_after, rel=1e-2)


def served_shape(base: FrozenBase) -> Any:
    from adaplex_server.model.config import read_config
    from adaplex_server.model.families import base_shape

    assert base.folder is not None
    return base_shape(read_config(base.folder, "tiny"))


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_bottleneck_does_what_its_files_say(name: str, base: FrozenBase, tmp_path: Path) -> None:
    """The saved tensors, applied in plain torch to one decoder layer's formula, give the trainer's loss."""
    from safetensors.torch import load_file

    given, before = options(**BOTTLENECKS[name]), weights(base)
    result = train_adapter(ROWS, base, tmp_path / "out", given, Quiet())
    after = weights(base)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert result.held_out_before is not None and result.held_out_after is not None
    assert result.held_out_after < result.held_out_before
    tensors = {k: v.float() for k, v in load_file(tmp_path / "out" / "adapter.safetensors").items()}
    places = ("attention_adapters", "output_adapters") if name == "houlsby" else ("output_adapters",)
    assert len(tensors) == 2 * 4 * len(places)
    read = read_adapter(tmp_path / "out", served_shape(base))
    assert {found.reads for found in read.bottlenecks.values()} == {"block" if name == "houlsby" else "sum"}
    assert len(read.bottlenecks) == 2 * len(places)

    def apply(layer: int, place: str, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{layer}.{place}.adapters.adapter."
        down = x.float() @ tensors[prefix + "adapter_down.0.weight"].t() + tensors[prefix + "adapter_down.0.bias"]
        inner = torch.nn.functional.silu(down) if name == "houlsby" else torch.relu(down)
        up = inner @ tensors[prefix + "adapter_up.weight"].t() + tensors[prefix + "adapter_up.bias"]
        return (h.float() + up).to(h.dtype)

    def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
        h = model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(h, positions)
        for i, layer in enumerate(model.model.layers):
            attended = layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None)[0]
            if name == "houlsby":
                attended = apply(i, "attention_adapters", attended, attended)
            h = h + attended
            inner = layer.mlp(layer.post_attention_layernorm(h))
            h = h + apply(i, "output_adapters", inner if name == "houlsby" else inner + h, inner)
        return model.lm_head(model.model.norm(h))

    batch = held_out(base, given)
    with torch.no_grad():
        logits = forward(base.model, batch.ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten())
    assert float(loss) == pytest.approx(result.held_out_after, rel=1e-2)


def test_soft_prompts_run_as_peft_runs_them(base: FrozenBase) -> None:
    ids = torch.arange(5, 17).view(2, 6)
    for method in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        adapter = attach_adapter(base, options(method=method, virtual_tokens=3))
        adapter.model.eval()
        with torch.no_grad():
            inputs = adapter.inputs(ids)
            ours = base.model(**inputs.arguments).logits[:, inputs.virtual :]
            theirs = adapter.model(input_ids=ids).logits[:, -6:]
        assert torch.equal(ours, theirs), method
        adapter.detach()


def test_first_weights_that_come_from_the_base(base: FrozenBase) -> None:
    """PiSSA begins as the base itself; LoftQ begins nearer to the dense weights than the quantized base is."""
    from safetensors.torch import load_file

    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits.float()
        adapter = attach_adapter(base, options(init="pissa"))
        begun = adapter.model.eval()(input_ids=ids).logits.float()
        adapter.detach()
    assert float((begun - plain).norm() / plain.norm()) < 0.02
    assert base.folder is not None
    dense = load_file(base.folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    adapter = attach_adapter(base, options(init="loftq", rank=8))
    layer = adapter.causal.model.layers[0].mlp.up_proj
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    lost = dense - layer.get_base_layer().weight.float()
    best = torch.linalg.svdvals(lost)[8:].norm()
    assert float((lost - delta).norm()) == pytest.approx(float(best), rel=0.02)
    adapter.detach()


@pytest.mark.parametrize("form", ["none", "fp4", "int8"])
def test_other_forms_of_the_base(form: str, base_folder: Path, tmp_path: Path) -> None:
    given = options(quantize=form)
    result = train_adapter(ROWS, load_frozen_base(base_folder, "tiny", "cpu", given), tmp_path / "out", given, Quiet())
    assert result.loss_last < result.loss_first
    with pytest.raises(InvalidRequest, match="loftq needs a dense base"):
        dense = load_frozen_base(base_folder, "tiny", "cpu", options(quantize="none"))
        attach_adapter(dense, options(init="loftq", quantize="none"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_updates_float32_weights(precision: str, base_folder: Path, tmp_path: Path) -> None:
    given = options(precision=precision, quantize="none", gradient_checkpointing=True)
    base = load_frozen_base(base_folder, "tiny", "cpu", given)
    result = train_adapter(ROWS, base, tmp_path / "out", given, Quiet())
    plain = options(quantize="none")
    other = train_adapter(ROWS, load_frozen_base(base_folder, "tiny", "cpu", plain), tmp_path / "b", plain, Quiet())
    assert result.loss_last == pytest.approx(other.loss_last, rel=0.02)


def test_a_packed_row_is_its_examples_alone(base: FrozenBase) -> None:
    from adaplex_adapters.training.packing import pack

    alone = [encode_example(e, base.tokenizer) for e in ROWS]
    packed = pack(alone, 90, seed=0)
    assert len(packed) < len(alone) and sorted(len(e.ids) for e in alone) == sorted(n for e in packed for n in e.parts)
    assert all(len(e.ids) <= 90 for e in packed)
    with torch.no_grad():
        losses = [float(base_loss(base.model, pad_batch(rows, 2), CPU)) for rows in (alone, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)

    apart = pad_batch(packed, 2)
    joined = Batch(apart.ids, apart.labels, apart.learned, apart.tokens)
    with torch.no_grad():
        leaky = float(causal_loss(base.model, ModelInputs({"input_ids": joined.ids}), joined, CPU))
    assert abs(leaky - losses[0]) > 10 * abs(losses[1] - losses[0])


def test_packing_loses_nothing_and_is_refused_where_it_would_change_a_row(base: FrozenBase) -> None:
    from adaplex_adapters.training.packing import check_packable, pack

    rows = [EncodedExample(i, (i,) * (1 + i % 7), (i,) * (1 + i % 7)) for i in range(1, 60)]
    found = pack(rows, 7, seed=1)
    assert sorted(t for e in found for t in e.ids) == sorted(t for e in rows for t in e.ids)
    assert pack(rows, 7, seed=1) == found
    for model_type, window in (("bloom", None), ("llama", 8)):
        with pytest.raises(InvalidRequest, match="packing"):
            check_packable(model_type, window, 100)
    with pytest.raises(InvalidRequest, match="packing"):
        TrainOptions(packing=True, method="prompt_tuning")
