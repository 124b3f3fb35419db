"""LoRA (with rsLoRA and DoRA) and IA3 through PEFT, and the files that describe them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.folder import TENSOR_FILE
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.training.methods.adapter import AdapterFiles, ModelInputs
from adaplex_adapters.training.options import ALL_LINEAR, TrainOptions

TRAINED, INITIAL = "default", "initial"
"""PEFT's name of what is learned, and of the frozen counterpart that PiSSA begins with."""


class PeftAdapter:
    """A PEFT model whose layers sit inside the base's modules."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def model(self) -> Any:
        return self._model

    @property
    def causal(self) -> Any:
        return self._model.get_base_model()

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def inputs(self, ids: torch.Tensor) -> ModelInputs:
        return ModelInputs({"input_ids": ids})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        trained = self.trained().values()
        with self._model.disable_adapter():
            yield
        for parameter in trained:  # PEFT switches gradients off with the adapter, and on again for all adapters
            parameter.requires_grad_(True)
        self._freeze_initial()

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        for parameter in self.trained().values():
            parameter.copy_(parameter.to(dtype))

    def files(self, base_name: str, dtype: torch.dtype) -> AdapterFiles:
        config = self._model.peft_config[TRAINED]
        tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self._state(TRAINED).items()}
        fields = _ia3_fields(config) if config.peft_type == "IA3" else _lora_fields(config)
        if INITIAL in self._model.peft_config:
            tensors = _joined(tensors, {k: v.detach().to("cpu", dtype) for k, v in self._state(INITIAL).items()})
            scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            fields |= {"r": 2 * config.r, "lora_alpha": 2 * config.r * scaling, "use_rslora": False}
        return AdapterFiles(tensors, config_fields(config, base_name) | fields, TENSOR_FILE, CONFIG_FILE)

    def detach(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        base = self._model.get_base_model()
        for path, layer in list(base.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                base.set_submodule(path, layer.get_base_layer())
        if hasattr(base, "peft_config"):
            del base.peft_config

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        found: dict[str, torch.Tensor] = get_peft_model_state_dict(self._model, adapter_name=name)
        return found

    def _freeze_initial(self) -> None:
        for name, parameter in self._model.named_parameters():
            if f".{INITIAL}." in name:
                parameter.requires_grad_(False)


def lora_model(model: Any, options: TrainOptions, init: bool | str = True) -> Any:
    """PEFT's model around the base with fresh LoRA weights. Raises InvalidRequest for unknown targets."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=init,
        target_modules=ALL_LINEAR if options.targets == (ALL_LINEAR,) else list(options.targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidRequest(f"targets {', '.join(options.targets)}: {error}", param="targets") from error


def ia3_model(model: Any, options: TrainOptions) -> Any:
    """PEFT's model around the base with IA3 vectors of ones (Liu et al. 2022): keys, values and the inner activation
    of the MLP unless targets say otherwise.
    """
    from peft import IA3Config, get_peft_model

    chosen = options.targets != (ALL_LINEAR,)
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=list(options.targets) if chosen else None,
        feedforward_modules=list(options.feedforward_targets) if chosen else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidRequest(
            f"ia3: {error}; name targets, and those of them that scale their input as feedforward_targets",
            param="targets",
        ) from error


def config_fields(config: Any, base_name: str) -> dict[str, Any]:
    """What every kind of PEFT's has: no path of this machine, none of PEFT's other defaults."""
    return {
        "peft_type": config.peft_type.value,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
    }


def _lora_fields(config: Any) -> dict[str, Any]:
    fields = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": bool(config.fan_in_fan_out),
    }
    return fields | ({"use_dora": True} if config.use_dora else {})


def _ia3_fields(config: Any) -> dict[str, Any]:
    return {
        "target_modules": sorted(config.target_modules),
        "feedforward_modules": sorted(config.feedforward_modules or ()),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
    }


def _joined(trained: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One LoRA of twice the rank that does what both do together: A stacked by rows, B by columns."""
    return {
        key: torch.cat([value, initial[key]], dim=0 if ".lora_A." in key else 1).contiguous()
        for key, value in trained.items()
    }
