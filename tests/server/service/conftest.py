"""Tokenizers of the two kinds that are served, a tiny base with adapters, and a service over a fake engine."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from adaplex_server.service.service import Service
from adaplex_server.service.settings import ServiceSettings
from support.tiny_base import make_base, make_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Name an adapter, stream its answer.",
    "Stop, stopping and stopped: <|im_end|> is no word. 12345 67890, one two three.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "user assistant system tool content message and one or more of the other words",
] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_tokenizer() -> Tokenizer:
    """Like GPT-2, Llama 3, Qwen: every byte is in the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=list(CONTROL), initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def llama_like_tokenizer() -> Tokenizer:
    """Like Llama 2 and Mistral: spaces are U+2581, other characters fall back to byte tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    return _save(byte_level_tokenizer(), folder, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def llama_like_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(llama_like_tokenizer(), tmp_path_factory.mktemp("llama-like"), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a token for each byte."""
    return make_base(tmp_path_factory.mktemp("tiny-base"), make_tokenizer())


def write_adapter(folder: Path, base: Path, seed: int, rank: int = 4) -> Path:
    """A PEFT LoRA folder on q_proj and v_proj that fits `tiny_base`; another seed is another content."""
    shape = base_shape(read_config(base))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in shape.linears.items():
        if path.endswith(("q_proj", "v_proj")):
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three PEFT folders of different content."""
    folder = tmp_path_factory.mktemp("adapters")
    return tuple(write_adapter(folder / f"a{seed}", tiny_base, seed) for seed in range(3))


@pytest.fixture
def settings(tmp_path: Path, tiny_base: Path) -> ServiceSettings:
    """A service over the fake engine, in a data folder of its own; quick to restart."""
    return ServiceSettings(
        data_dir=tmp_path,
        engine=EngineSettings(base=str(tiny_base), store=str(tmp_path / "adapters"), base_name="tiny", quantize="none"),
        aliases=("base",),
        restart_first=0.05,
        restart_longest=0.2,
        engine_command=(sys.executable, str(Path(__file__).parent / "fake_engine.py")),
    )


@pytest.fixture
async def service(settings: ServiceSettings) -> AsyncIterator[Service]:
    """Started, and closed at the end."""
    made = Service(settings)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def running(settings: ServiceSettings) -> AsyncIterator[Callable[..., Awaitable[Service]]]:
    """Starts services with other settings, one after the other or together, and closes them at the end."""
    made: list[Service] = []

    async def start(**changes: Any) -> Service:
        service = Service(replace(settings, **changes))
        made.append(service)
        await service.start()
        return service

    yield start
    for service in made:
        await service.close()
