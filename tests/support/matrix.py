"""The matrix of what is served: adapter kind x base format x family, each cell one batch of many kinds in one engine.

A cell is a tiny random base of a family in a format, and adapters of several kinds that PEFT has written for it. All of
them and the base itself stand in the same steps of the real engine. The oracle of each row is PEFT with that adapter
alone on the base's own quantized weights in float32; of bottlenecks, which PEFT does not have, `adapter_reference`.

`PYTHONPATH=tests python -m support.matrix docs/matrix.md` writes down what is run.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.reader import read_adapter
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.messages import AdapterLoaded, LoadAdapter, Submit
from adaplex_server.kernels import llm_int8
from adaplex_server.model.base import Base
from adaplex_server.model.families import FAMILIES, base_shape, linear_targets, module_paths
from adaplex_server.vocabulary import SamplingParams
from support import adapter_reference
from support.bottleneck_folder import write_bottleneck
from support.grouped_checkpoint import write_grouped
from support.mixed import Traffic, Verdict, Zoo, check_row, settings_for
from support.peft_kinds import PEFT_KINDS, peft_config, targets_of
from support.tiny_models import CONFIGS, save_tiny

BOTTLENECK = "bottleneck"
KINDS = (*PEFT_KINDS, BOTTLENECK)
GROUPED: Mapping[str, tuple[int, Mapping[str, Any]]] = MappingProxyType(
    {
        "gptq": (4, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        "gptq-act-order": (4, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
        "gptq-8bit": (8, {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}),
        "awq": (4, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    }
)
QUANTIZED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "float32": {"quantize": "none"},
        "nf4-double": {"quantize": "nf4"},
        "nf4": {"quantize": "nf4", "double_quant": False},
        "fp4": {"quantize": "fp4", "double_quant": False},
        "int8": {"quantize": "int8"},
        "int8-absmax": {"quantize": "int8-absmax"},
        "int8-zeropoint": {"quantize": "int8-zeropoint"},
    }
)
FORMATS = (*QUANTIZED, *GROUPED)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Families with Llama's layers: what the reference of bottlenecks takes."""
GROUPED_FAMILIES = (*LLAMA_LIKE, "gemma", "phi3")
"""Families for which the writer of GPTQ and AWQ checkpoints knows the names."""
FEEDFORWARD = ("down_proj", "dense_4h_to_h", "fc2", "c_proj")
"""What leads out of a block: IA3 scales the input of these, the output of all others."""
KINDS_OF_A_SAMPLE = 6
CLOSE = 5e-4
CLOSE_INT8 = 0.25
"""LLM.int8 rounds activations: the last bit of a sum decides codes."""
CLOSE_GPU = 2e-3
"""Sums in another order than the oracle's, which stays on the CPU."""


@dataclass(frozen=True)
class Cell:
    """One batch. family: of CONFIGS; kinds: adapters in it, beside the base."""

    family: str
    format: str
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.family} {self.format}"


def possible(family: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Formats and kinds that can be made for this family."""
    formats = FORMATS if family.startswith(GROUPED_FAMILIES) else tuple(QUANTIZED)
    tied = bool(CONFIGS[family]().tie_word_embeddings)
    kinds = [kind for kind in KINDS if not (tied and kind in ("lora head", "lora embedding", "lora saved"))]
    if not family.startswith(LLAMA_LIKE):
        kinds.remove(BOTTLENECK)
    if family == "phi":
        kinds = [kind for kind in kinds if kind not in ("lora saved", "lora head")]  # its head has a bias
    if family == "gpt2":
        kinds = [kind for kind in kinds if not kind.startswith(("loha", "lokr"))]  # PEFT has them for no Conv1D
    if family.startswith("falcon-groups"):
        # transformers keeps these keys once for each query head, so PEFT's prefix is no prefix of the base's own cache.
        kinds = [kind for kind in kinds if not kind.startswith("prefix_tuning")]
    return tuple(formats), tuple(kinds)


def every_cell() -> list[Cell]:
    """All families in all formats with all kinds."""
    return [Cell(family, form, possible(family)[1]) for family in CONFIGS for form in possible(family)[0]]


def sample(seed: int = 0) -> list[Cell]:
    """Every family once, every format and every kind several times; formats that only some families have go first."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    rng.shuffle(kinds)
    turn, forms, cells = cycle(kinds), cycle(QUANTIZED), []
    grouped = cycle([*GROUPED, next(forms), next(forms)])
    for family in CONFIGS:
        formats, allowed = possible(family)
        form = next(grouped) if len(formats) > len(QUANTIZED) else next(forms)
        chosen = islice((kind for kind in turn if kind in allowed), KINDS_OF_A_SAMPLE)
        cells.append(Cell(family, form, tuple(sorted(chosen, key=KINDS.index))))
    return cells


class EightBit(torch.nn.Linear):
    """LLM.int8 of one module; that its rows are bitsandbytes' is shown elsewhere. Its weight is the dequantized one."""

    def __init__(self, weight: torch.Tensor, dequantized: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.weight.data, self.eight = dequantized, llm_int8.quantize(weight)
        if bias is not None:
            self.bias.data = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return llm_int8.linear(x.flatten(0, -2), self.eight, self.bias).unflatten(0, x.shape[:-1])


def quantize_oracle(model: PreTrainedModel, base: Base, eight_bit: bool) -> None:
    """Put the base's weights into transformers' model."""
    config = base.config
    transposed = FAMILIES[config.family].transposed
    for layer, weights in enumerate(base.layers):
        for linear, targets in linear_targets(config).items():
            whole = weights.linears[linear].dequantized().cpu()
            for path, span in zip(module_paths(config, layer, linear), targets.spans, strict=True):
                module, part = model.get_submodule(path), whole[slice(*span)]
                if eight_bit:
                    dense = module.weight.data.t().contiguous() if transposed else module.weight.data
                    model.set_submodule(path, EightBit(dense, part.contiguous(), module.bias))
                else:
                    module.weight.data = (part.t() if transposed else part).contiguous()


@dataclass
class Alone:
    """Each adapter of a cell by itself: name -> log-probabilities [tokens, vocabulary] of a text's next tokens."""

    base: Any
    folders: dict[str, Path] = field(default_factory=dict)
    adapted: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)

    def add(self, kind: str, folder: Path, shape: BaseShape) -> None:
        """Write an adapter of this kind with random weights to `folder`."""
        if kind == BOTTLENECK:
            config = self.base.config
            write_bottleneck(
                folder, layers=config.num_hidden_layers, hidden=config.hidden_size, model_type=config.model_type
            )
            adapter = read_adapter(folder, shape)
            self.adapted[kind] = lambda ids: adapter_reference.logits(self.base, adapter, ids)
        else:
            from peft import get_peft_model

            model = copy.deepcopy(self.base)
            peft = get_peft_model(model, peft_config(kind, options_for(kind, model, shape)))
            with torch.no_grad():
                for parameter in (p for p in peft.parameters() if p.requires_grad):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            peft.save_pretrained(folder)
            peft.eval()
            self.adapted[kind] = lambda ids: peft(input_ids=ids).logits
        self.folders[kind] = folder

    @torch.no_grad()
    def logprobs(self, kind: str | None, text: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([text])
        logits = self.base(ids).logits if kind is None else self.adapted[kind](ids)
        return logits[0, -len(text) :].float().log_softmax(-1)


def options_for(kind: str, model: PreTrainedModel, shape: BaseShape) -> dict[str, Any]:
    """What PEFT's config of this kind must be told about this family."""
    options = targets_of(kind, model)
    if kind.startswith("prefix_tuning") and shape.family.startswith("falcon"):
        # PEFT takes the number of query heads, unless it is told.
        heads = shape.num_kv_heads
        options = {"num_attention_heads": heads, "token_dim": heads * shape.head_dim}
    if kind == "ia3":
        options["feedforward_modules"] = [name for name in options["target_modules"] if name in FEEDFORWARD]
    return options


def run_cell(cell: Cell, folder: Path, seed: int = 0, device: str = "cpu") -> Verdict:
    """Raises AssertionError with the row that differs from its adapter alone. device: of the engine."""
    torch.manual_seed(seed)
    made = folder / "base"
    model = save_tiny(made, cell.family)
    if cell.format in GROUPED:
        bits, quantization = GROUPED[cell.format]
        (folder / "grouped").mkdir()
        write_grouped(folder / "grouped", made, dict(quantization), bits)
        made = folder / "grouped"
    zoo = Zoo(made, folder / "store", {}, {})
    room: dict[str, Any] = {
        "max_slots": 24,
        "max_rank": 128,
        "max_rows": 24,
        "adapter_bytes": 64 << 20,
        "kv_bytes": 16 << 20,
        # Where no text can be longer than those of the first training, both sides take the rotary factors for these.
        "max_context": 64,
    }
    settings = settings_for(zoo, device=device, **room, **QUANTIZED.get(cell.format, {}))
    traffic, base = Traffic.start(zoo, settings)
    assert base.format == cell.format.replace("float32", base.format).replace("gptq-act-order", "gptq"), base.format
    quantize_oracle(model, base, cell.format == "int8")
    alone, store, shape = Alone(model), AdapterStore(folder / "store"), base_shape(base.config)
    for kind in cell.kinds:
        alone.add(kind, folder / kind.replace(" ", "-"), shape)
        zoo.revisions[kind] = store.commit(read_adapter(alone.folders[kind], shape))
    virtual = {kind: read_adapter(alone.folders[kind], shape).spec.virtual_tokens for kind in cell.kinds}
    rows = send(traffic, zoo, virtual, random.Random(seed))
    verdict = Verdict()
    close = CLOSE_INT8 if cell.format == "int8" else CLOSE_GPU if device == "cuda" else CLOSE
    for row, kind in enumerate(rows):
        text = traffic.submits[row].prompt + [token.token for token in traffic.tokens[row]]
        logprobs = alone.logprobs(kind, text)
        try:
            check_row(traffic.submits[row], traffic.tokens[row], logprobs, tie=close, close=close, verdict=verdict)
        except AssertionError as error:
            raise AssertionError(f"{cell.name}, {kind or 'base'}: {error}") from None
    return verdict


def send(traffic: Traffic, zoo: Zoo, virtual: Mapping[str, int], rng: random.Random) -> list[str | None]:
    """Prove every adapter, then run two rows of each and of the base side by side; what each row is of."""
    for call, kind in enumerate(virtual):
        traffic.inbox.put(LoadAdapter(call, zoo.revisions[kind]))
    rows: list[str | None] = [None, *virtual, *virtual, None]
    rng.shuffle(rows)
    vocabulary = traffic.info.vocab_size
    for row, kind in enumerate(rows):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(2, 20))]
        sampling = SamplingParams(max_tokens=rng.randint(3, 7), temperature=0.0, logprobs=2, ignore_eos=True)
        revision = zoo.revisions[kind] if kind else None
        traffic.submit(Submit(row, prompt, sampling, revision, virtual_tokens=virtual[kind] if kind else 0))
    traffic.settle()
    failed = {kind: traffic.answers[call] for call, kind in enumerate(virtual)}
    refused = {kind: answer for kind, answer in failed.items() if not isinstance(answer, AdapterLoaded)}
    assert not refused, refused
    return rows


def table(cells: Iterable[Cell]) -> str:
    """What is run, one line a cell."""
    lines = [f"| {cell.family} | {cell.format} | {', '.join(cell.kinds)} |" for cell in cells]
    return "\n".join(["| Family | Format | Adapters beside the base |", "|---|---|---|", *lines])


def document() -> str:
    """docs/matrix.md."""
    everything, cells = every_cell(), sample()
    together = sum(len(cell.kinds) for cell in everything)
    return f"""# What is served together

Each line is one batch in one engine on a CPU in float32: adapters of these kinds, written by PEFT, and the base without
one, all in the same steps. Every row's greedy tokens are those of PEFT with that adapter alone on the base's quantized
weights, and its log-probabilities agree within {CLOSE:g} (within {CLOSE_INT8:g} for `int8`, LLM.int8, where the last
bit of a sum can decide the code of an activation). Bottlenecks, which PEFT does not have, are held against their
definition in plain torch.

`make test` runs the {len(cells)} batches below, {sum(len(cell.kinds) for cell in cells)} pairs of adapter and base.
`ADAPLEX_MATRIX=full pytest tests/server/engine/test_matrix.py` runs all: {len(CONFIGS)} families x {len(FORMATS)}
formats x {len(KINDS)} kinds, as far as they can be made, in {len(everything)} batches, {together} pairs.
`pytest tests/gpu/test_matrix.py` asks the same of an engine on a GPU (within {CLOSE_GPU:g}); it has not run
on one yet.

GPTQ and AWQ are written for families with Llama's names alone, adapters of embedding and head for untied ones,
bottlenecks for families with Llama's layers.

This file is written by `PYTHONPATH=tests python -m support.matrix docs/matrix.md`.

{table(cells)}
"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
