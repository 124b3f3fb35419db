"""Mixed is solo: random traffic over many adapters in one engine, each row compared with PEFT alone on the same base.

The oracle is transformers + PEFT in float32 with the engine's own dequantized weights, so it needs no bitsandbytes. It
is asked for its log-probabilities along the tokens that the engine chose: at each of them the token must be the
oracle's best, or a proven tie (within `tie` of the best), and its log-probability must agree within `close`. A row of
another adapter fails both by far.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from adaplex_adapters.reader import read_adapter
from adaplex_adapters.store import AdapterStore
from adaplex_server.engine.assembly import assemble
from adaplex_server.engine.engine import Engine
from adaplex_server.engine.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterLoaded,
    Cancel,
    DropAdapter,
    EngineInfo,
    LoadAdapter,
    RowEnd,
    RowToken,
    StepDone,
    Submit,
)
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base, load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape, linear_targets, module_paths
from adaplex_server.vocabulary import SamplingParams

VOCAB = 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

RECIPES: dict[str, dict[str, Any]] = {
    "all-8": {"r": 8, "lora_alpha": 16, "target_modules": LINEARS},
    "qv-1": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "all-64": {"r": 64, "lora_alpha": 64, "target_modules": LINEARS},
    "rs-9": {"r": 9, "lora_alpha": 9, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "one-17": {"r": 17, "lora_alpha": 34, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 12, "down_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    },
    "mlp-33": {"r": 33, "lora_alpha": 33, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all-8b": {"r": 8, "lora_alpha": 16, "target_modules": LINEARS},
    "qv-1b": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "o-3": {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"]},
}
"""What `peft.LoraConfig` is given for each adapter; those that end in "b" are reloads of the one before."""


@dataclass(frozen=True)
class Zoo:
    """A tiny random base in a folder, its adapters in a store, and their revisions by name."""

    base: Path
    store: Path
    revisions: dict[str, str]
    folders: dict[str, Path]


def make_zoo(
    folder: Path, recipes: dict[str, dict[str, Any]] = RECIPES, seed: int = 0, config: Any | None = None
) -> Zoo:
    """Checkpoint by transformers, adapters by PEFT, all random. config: transformers', a small Llama's by default."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = config or LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = folder / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    store, shape = AdapterStore(folder / "store"), base_shape(read_config(base))
    revisions: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for name, recipe in recipes.items():
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**recipe))
        for path, tensor in model.named_parameters():
            if "lora_" in path:
                tensor.data = torch.randn_like(tensor) * (0.3 if "lora_A" in path else 0.15)
        folders[name] = folder / "adapters" / name
        model.save_pretrained(folders[name])
        revisions[name] = store.commit(read_adapter(folders[name], shape))
    return Zoo(base, folder / "store", revisions, folders)


def settings_for(zoo: Zoo, **changes: Any) -> EngineSettings:
    """An engine for the zoo with pools so small that rows, slots and pages run out."""
    chosen: dict[str, Any] = {
        "base": str(zoo.base),
        "store": str(zoo.store),
        "base_name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "kv_bytes": 11 * 16 * 2 * 2 * 2 * 16 * 4,
        "max_rows": 8,
        "max_step_tokens": 24,
        "max_context": 128,
        "max_slots": 4,
        "max_rank": 64,
        "adapter_bytes": 14 * 8 * 2 * 4 * 1700,
    }
    return EngineSettings(**{**chosen, **changes})


class Oracle:
    """PEFT on the base's dequantized weights, one adapter at a time."""

    def __init__(self, zoo: Zoo, base: Base, device: torch.device) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32)
        for layer, weights in enumerate(base.layers):
            for linear, targets in linear_targets(base.config).items():
                whole = weights.linears[linear].dequantized().float().cpu()
                for path, span in zip(module_paths(base.config, layer, linear), targets.spans, strict=True):
                    model.get_submodule(path).weight.data = whole[slice(*span)].contiguous()
        first, *others = zoo.folders
        self._peft = PeftModel.from_pretrained(model, zoo.folders[first], adapter_name=first)
        for name in others:
            self._peft.load_adapter(str(zoo.folders[name]), adapter_name=name)
        self._peft.to(device).eval()
        self._device = device
        self._names = {revision: name for name, revision in zoo.revisions.items()}

    @torch.no_grad()
    def logprobs(self, revision: str | None, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """For each text [n, vocab] float32: the log-probabilities of what follows each of its tokens."""
        longest = max(len(text) for text in texts)
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self._device)
        if revision is None:
            with self._peft.disable_adapter():
                logits = self._peft(input_ids=ids).logits
        else:
            self._peft.set_adapter(self._names[revision])
            logits = self._peft(input_ids=ids).logits
        found = logits.float().log_softmax(-1).cpu()
        return [row[: len(text)] for row, text in zip(found, texts, strict=True)]


@dataclass
class Traffic:
    """An engine that is stepped by hand, and all that it has said. tokens: without the times at which rows began."""

    engine: Engine
    info: EngineInfo
    inbox: queue.SimpleQueue
    check: Callable[[], None]
    sent: list[msgspec.Struct] = field(default_factory=list)
    submits: dict[int, Submit] = field(default_factory=dict)
    tokens: dict[int, list[RowToken]] = field(default_factory=dict)
    ends: dict[int, RowEnd] = field(default_factory=dict)
    answers: dict[int, AdapterLoaded | AdapterFailed | AdapterDropped] = field(default_factory=dict)

    @staticmethod
    def start(zoo: Zoo, settings: EngineSettings) -> tuple[Traffic, Base]:
        """The engine in this process, its base, and nothing running."""
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        config = read_config(zoo.base, "tiny")
        base = load_base(
            zoo.base,
            config=config,
            quantize=settings.quantize,
            double_quant=settings.double_quant,
            dtype=dtype,
            device=device,
        )
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        sent: list[msgspec.Struct] = []
        store, shape = AdapterStore(zoo.store), base_shape(config)
        engine, info = assemble(settings, base, lambda revision: store.read(revision, shape), inbox, sent.append)
        return Traffic(engine, info, inbox, engine.parts.check_integrity, sent), base

    def submit(self, message: Submit) -> None:
        self.submits[message.row] = message
        self.inbox.put(message)

    def step(self, wait: bool = False) -> bool:
        """One step, audited."""
        assert self.engine.take_messages(wait=wait)
        busy = self.engine.step()
        self.check()
        for message in self.sent:
            if isinstance(message, StepDone):
                for token in message.tokens:
                    self.tokens.setdefault(token.row, []).append(msgspec.structs.replace(token, began=0.0))
                for end in message.ends:
                    assert end.row not in self.ends, "a row has ended twice"
                    self.ends[end.row] = end
            elif isinstance(message, AdapterLoaded | AdapterFailed | AdapterDropped):
                self.answers[message.call] = message
        self.sent.clear()
        return busy

    def settle(self) -> None:
        """Until every row has ended; sleeps only where the engine would (an adapter is being read)."""
        busy = True
        while len(self.ends) < len(self.submits):
            busy = self.step(wait=not busy)


def random_rounds(traffic: Traffic, zoo: Zoo, rounds: int, seed: int = 0) -> None:
    """Each round: rows of random adapters join at random steps, some are cancelled, an adapter is loaded or dropped."""
    rng = random.Random(seed)
    names: list[str | None] = [None, *zoo.revisions]
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]
    calls = len(traffic.answers)
    for _ in range(rounds):
        for _ in range(rng.randint(2, 7)):
            name = rng.choice(names)
            prompt = shared[: rng.choice([0, 0, 16, 33])] + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30))]
            sampling = SamplingParams(
                max_tokens=rng.choice([1, 4, 9, 9, 20]),
                temperature=0.0,
                logprobs=rng.choice([0, 3]),
                prompt_logprobs=1 if rng.random() < 0.1 else None,
                ignore_eos=True,
            )
            row = len(traffic.submits)
            traffic.submit(Submit(row, prompt, sampling, zoo.revisions[name] if name else None))
            for _ in range(rng.choice([0, 0, 0, 1, 3])):
                traffic.step()
            if rng.random() < 0.08:
                traffic.inbox.put(Cancel(rng.randrange(row + 1)))
        if rng.random() < 0.3:
            calls += 1
            kind = rng.choice([LoadAdapter, DropAdapter])
            traffic.inbox.put(kind(calls, zoo.revisions[rng.choice(list(zoo.revisions))]))
            if kind is DropAdapter:
                traffic.step()
                traffic.inbox.put(LoadAdapter(calls := calls + 1, traffic_revision(zoo, rng)))
        traffic.settle()


def traffic_revision(zoo: Zoo, rng: random.Random) -> str:
    """Any adapter's revision."""
    return zoo.revisions[rng.choice(list(zoo.revisions))]


@dataclass
class Verdict:
    """What a comparison found. worst: largest difference of a log-probability. ties: tokens that were a proven tie."""

    rows: int = 0
    tokens: int = 0
    ties: int = 0
    worst: float = 0.0


def compare(traffic: Traffic, oracle: Oracle, tie: float, close: float) -> Verdict:
    """Every row of the traffic against its adapter alone; raises AssertionError with the row that differs."""
    verdict = Verdict()
    for revision in {submit.revision for submit in traffic.submits.values()}:
        rows = [s for s in traffic.submits.values() if s.revision == revision and s.row in traffic.tokens]
        for at in range(0, len(rows), 64):
            part = rows[at : at + 64]
            texts = [s.prompt + [t.token for t in traffic.tokens[s.row]] for s in part]
            for submit, logprobs in zip(part, oracle.logprobs(revision, texts), strict=True):
                check_row(submit, traffic.tokens[submit.row], logprobs, tie, close, verdict)
    return verdict


def check_row(
    submit: Submit, tokens: list[RowToken], logprobs: torch.Tensor, tie: float, close: float, verdict: Verdict
) -> None:
    verdict.rows += 1
    for i, token in enumerate(tokens):
        wanted = logprobs[len(submit.prompt) - 1 + i]
        where = f"row {submit.row} ({(submit.revision or 'base')[:8]}), token {i}"
        gap = float(wanted.max() - wanted[token.token])
        assert gap <= tie, f"{where}: token {token.token} is {gap:.4f} below the best one, {int(wanted.argmax())}"
        assert token.logprob is not None, where
        told = [(token.token, token.logprob.logprob), *token.logprob.top]
        worst = max(abs(value - float(wanted[id_])) for id_, value in told)
        assert worst <= close, f"{where}: a log-probability differs by {worst}"
        verdict.tokens += 1
        verdict.ties += gap > 0
        verdict.worst = max(verdict.worst, worst)
    scores = tokens[0].prompt_logprobs
    if scores is not None:
        for position, score in enumerate(scores[1:]):
            assert score is not None
            difference = abs(score.logprob - float(logprobs[position][submit.prompt[position + 1]]))
            assert difference <= close, f"row {submit.row}: prompt token {position + 1} differs by {difference}"
