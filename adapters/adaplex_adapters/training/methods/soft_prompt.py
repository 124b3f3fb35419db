"""Prompt tuning, P-tuning and prefix tuning through PEFT. What is saved is the prompt itself: an encoder or a
projection is run once, at the end of training.

Prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021) put learned embeddings before the first token;
prefix tuning (Li and Liang 2021) puts learned keys and values before it in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adaplex_adapters.folder import TENSOR_FILE
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.training.methods.adapter import AdapterFiles, ModelInputs
from adaplex_adapters.training.methods.peft_adapter import config_fields
from adaplex_adapters.training.options import P_TUNING, PREFIX, PROMPT, TrainOptions

_OTHER_CACHES = ("bloom", "gpt_bigcode")
"""Families for which PEFT turns keys or values round."""
_SHAPE_FIELDS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


class SoftPrompt:
    """A PEFT model with a prompt encoder beside the base, whose modules are untouched."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def model(self) -> Any:
        return self._model

    @property
    def causal(self) -> Any:
        return self._model.get_base_model()

    @property
    def _is_prefix(self) -> bool:
        return bool(self._config.peft_type.value == "PREFIX_TUNING")

    @property
    def _config(self) -> Any:
        return self._model.peft_config["default"]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def inputs(self, ids: torch.Tensor) -> ModelInputs:
        rows = ids.shape[0]
        if self._is_prefix:
            return ModelInputs({"input_ids": ids, "past_key_values": self._model.get_prompt(rows)})
        tokens = self._model.word_embeddings(ids)
        prompt = self._model.get_prompt(rows).to(tokens.dtype)
        return ModelInputs({"inputs_embeds": torch.cat([prompt, tokens], dim=1)}, virtual=prompt.shape[1])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._model.disable_adapter():
            yield

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        prompt = self._prompt(dtype).float()
        encoder = self._model.prompt_encoder["default"]
        encoder.embedding = torch.nn.Embedding.from_pretrained(prompt.to(encoder.embedding.weight.device))
        # With this PEFT takes the embedding as it is, past encoder and projection.
        self._config.inference_mode = True

    def files(self, base_name: str, dtype: torch.dtype) -> AdapterFiles:
        config = self._config
        fields = {name: getattr(config, name) for name in _SHAPE_FIELDS}
        if config.peft_type.value == "P_TUNING":
            fields["encoder_hidden_size"] = config.encoder_hidden_size
        if self._is_prefix:
            fields["prefix_projection"] = config.prefix_projection
            fields["encoder_hidden_size"] = config.encoder_hidden_size
        tensors = {"prompt_embeddings": self._prompt(dtype)}
        return AdapterFiles(tensors, config_fields(config, base_name) | fields, TENSOR_FILE, CONFIG_FILE)

    def detach(self) -> None:
        pass

    def _prompt(self, dtype: torch.dtype) -> torch.Tensor:
        """[virtual tokens, width], or for a prefix [virtual tokens, layers * 2 * width of keys]."""
        if self._config.inference_mode:
            found = self._model.prompt_encoder["default"].embedding.weight
        else:
            found = self._model.get_prompt_embedding_to_save("default")
        return found.detach().to("cpu", dtype).contiguous()


def soft_prompt_model(model: Any, tokenizer: Any, options: TrainOptions) -> Any:
    """PEFT's model around the base with a fresh prompt; its weights are float32."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, PromptTuningInit, get_peft_model

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": options.virtual_tokens}
    if options.method == PREFIX:
        width = {"encoder_hidden_size": options.encoder_hidden_size or model.config.hidden_size}
        config = PrefixTuningConfig(**common, prefix_projection=options.prefix_projection, **width)
    elif options.method == P_TUNING:
        config = PromptEncoderConfig(
            **common, encoder_hidden_size=options.encoder_hidden_size, encoder_dropout=options.dropout
        )
    else:
        assert options.method == PROMPT
        config = PromptTuningConfig(**common, prompt_tuning_init=PromptTuningInit.RANDOM)
    made = get_peft_model(model, config)
    made.prompt_encoder.float()
    if options.method == PROMPT:
        _begin_with_tokens(made, tokenizer, options)
    if options.method == PREFIX and not options.prefix_projection:
        _begin_with_keys(made, tokenizer, options)
    return made


@torch.no_grad()
def _begin_with_tokens(model: Any, tokenizer: Any, options: TrainOptions) -> None:
    """Prompts begin as embeddings of real tokens. Gaussian ones (PEFT's default) are far from anything that the base
    has seen.
    """
    words = model.word_embeddings
    chosen = _first_tokens(tokenizer, options).to(words.weight.device)
    model.prompt_encoder["default"].embedding.weight.copy_(words(chosen).float())


@torch.no_grad()
def _begin_with_keys(model: Any, tokenizer: Any, options: TrainOptions) -> None:
    """Prefixes begin as the keys and values of real tokens (Li and Liang 2021, section 7.4), where the base's cache
    has the form that PEFT gives it: [rows, heads, tokens, width] in every layer. Elsewhere they begin as PEFT's do.
    """
    config, base = model.peft_config["default"], model.get_base_model()
    weight = model.prompt_encoder["default"].embedding.weight
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    chosen = _first_tokens(tokenizer, options).to(weight.device)
    cache = base(input_ids=chosen[None], use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in getattr(cache, "layers", [])]
    wanted = (1, heads, options.virtual_tokens, width)
    if base.config.model_type in _OTHER_CACHES or any(t.shape != wanted for pair in layers for t in pair):
        return
    # [tokens, layers, key or value, heads, width]
    both = torch.stack([torch.stack(pair) for pair in layers])[:, :, 0].permute(3, 0, 1, 2, 4)
    weight.copy_(both.reshape(options.virtual_tokens, -1).float())


def _first_tokens(tokenizer: Any, options: TrainOptions) -> torch.Tensor:
    """Ids of the given text over and over, or ordinary ones drawn from the vocabulary."""
    count = options.virtual_tokens
    if options.prompt_init_text is not None:
        ids = tokenizer.encode(options.prompt_init_text, add_special_tokens=False) or [0]
        return torch.tensor([ids[i % len(ids)] for i in range(count)])
    ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    return ordinary[torch.randint(len(ordinary), (count,))]
