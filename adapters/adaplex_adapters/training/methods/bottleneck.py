"""Bottleneck adapters: a small two-layer network behind a block of each layer, as the `adapters` library has them.

    Houlsby et al. 2019 (its double_seq_bn): after attention and after the MLP, h + U f(D h), f = swish.
    Pfeiffer et al. 2020 (its seq_bn): after the MLP alone, h + U f(D (h + residual)), f = relu, where residual is what
    the decoder layer will add to h. On families that the library only hooks into it cannot read the residual: there
    it is h + U f(D h).

h is the block's output before the residual is added. The files are those of the library: its config, and tensors
named model.layers.N.{attention,output}_adapters.adapters.NAME.{adapter_down.0,adapter_up}.{weight,bias}.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.folder import LIBRARY_FILE
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.training.methods.adapter import AdapterFiles, ModelInputs
from adaplex_adapters.training.options import TrainOptions

NAME = "adapter"
ATTENTION, OUTPUT = "attention_adapters", "output_adapters"
_STD = 0.02
_READS_RESIDUAL = ("llama", "mistral")


class Bottleneck(torch.nn.Module):
    """h -> h + up(f(down(x))), float32 weights; x is h, or h + residual. Shapes [..., width]."""

    def __init__(self, width: int, inner: int, activation: str, dropout: float, device: torch.device) -> None:
        super().__init__()
        down, up = torch.nn.Linear(width, inner, device=device), torch.nn.Linear(inner, width, device=device)
        self.adapter_down, self.adapter_up = torch.nn.Sequential(down), up
        self._activation, self._dropout = {"relu": F.relu, "swish": F.silu}[activation], dropout
        for linear in (down, up):
            torch.nn.init.normal_(linear.weight, std=_STD)
            torch.nn.init.zeros_(linear.bias)

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        x = h if residual is None else h + residual
        inner = self._activation(self.adapter_down(x.to(self.adapter_up.weight.dtype)))
        added = F.dropout(self.adapter_up(inner), self._dropout, self.training)
        return (h.float() + added.float()).to(h.dtype)


class BottleneckAdapter:
    """Bottlenecks hooked into a base whose layers have self_attn, post_attention_layernorm and mlp. Owns the hooks."""

    def __init__(self, causal: Any, options: TrainOptions, device: torch.device) -> None:
        layers = _layers(causal)
        houlsby = options.bottleneck_place == "houlsby"
        places = (ATTENTION, OUTPUT) if houlsby else (OUTPUT,)
        width = causal.config.hidden_size
        inner = max(1, int(width // options.reduction_factor))
        self._causal, self._options, self._enabled = causal, options, True
        self._activation = "swish" if houlsby else "relu"
        self._reads_residual = not houlsby and causal.config.model_type in _READS_RESIDUAL
        self.bottlenecks = torch.nn.ModuleDict(
            {
                f"{place}-{i}": Bottleneck(width, inner, self._activation, options.dropout, device)
                for i in range(len(layers))
                for place in places
            }
        )
        self._residuals: dict[int, torch.Tensor] = {}
        self._hooks = [hook for i, layer in enumerate(layers) for hook in self._hook(i, layer, houlsby)]
        # A part of the model, so that train(), eval() and to() reach it.
        causal.add_module("bottlenecks", self.bottlenecks)

    @property
    def model(self) -> Any:
        return self._causal

    @property
    def causal(self) -> Any:
        return self._causal

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.bottlenecks.named_parameters())

    def inputs(self, ids: torch.Tensor) -> ModelInputs:
        return ModelInputs({"input_ids": ids})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        for parameter in self.bottlenecks.parameters():
            parameter.copy_(parameter.to(dtype))

    def files(self, base_name: str, dtype: torch.dtype) -> AdapterFiles:
        tensors = {
            f"model.layers.{i}.{place}.adapters.{NAME}.{rest}": p.detach().to("cpu", dtype).contiguous()
            for name, p in self.trained().items()
            for key, _, rest in [name.partition(".")]
            for place, i in [key.split("-")]
        }
        return AdapterFiles(tensors, self._config(base_name), LIBRARY_FILE, CONFIG_FILE)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._causal.bottlenecks

    def _hook(self, index: int, layer: Any, houlsby: bool) -> Iterator[Any]:
        if houlsby:
            yield layer.self_attn.register_forward_hook(self._after(f"{ATTENTION}-{index}", None))
        if not self._reads_residual:
            yield layer.mlp.register_forward_hook(self._after(f"{OUTPUT}-{index}", None))
            return

        def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            self._residuals[index] = arguments[0]

        yield layer.post_attention_layernorm.register_forward_pre_hook(keep)
        yield layer.mlp.register_forward_hook(self._after(f"{OUTPUT}-{index}", index))

    def _after(self, key: str, residual: int | None) -> Any:
        def change(_: Any, __: Any, output: Any) -> Any:
            kept = None if residual is None else self._residuals.pop(residual)
            if not self._enabled:
                return output
            bottleneck = self.bottlenecks[key]
            if isinstance(output, tuple):
                return (bottleneck(output[0], kept), *output[1:])
            return bottleneck(output, kept)

        return change

    def _config(self, base_name: str) -> dict[str, Any]:
        houlsby = self._options.bottleneck_place == "houlsby"
        fields = {
            "mh_adapter": houlsby,
            "output_adapter": True,
            "reduction_factor": self._options.reduction_factor,
            "non_linearity": self._activation,
            "original_ln_before": self._reads_residual,
            "original_ln_after": True,
            "ln_before": False,
            "ln_after": False,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "scaling": 1.0,
            "is_parallel": False,
            "use_gating": False,
            "dropout": self._options.dropout,
            "init_weights": "bert",
            "architecture": None,
        }
        config = self._causal.config
        return {
            "config": fields,
            "hidden_size": config.hidden_size,
            "model_class": type(self._causal).__name__,
            "model_name": base_name,
            "model_type": config.model_type,
            "name": NAME,
            "version": "adapters.1.2.0",
        }


def _layers(causal: Any) -> Any:
    layers = getattr(causal.base_model, "layers", None)
    wanted = ("self_attn", "post_attention_layernorm", "mlp")
    if (
        layers is None
        or not all(hasattr(layer, part) for layer in layers for part in wanted)
        or any(hasattr(layer, "pre_feedforward_layernorm") for layer in layers)
    ):
        raise InvalidRequest(
            f"bottleneck adapters are trained on bases with Llama's layers (Llama, Mistral, Qwen), not on "
            f"{causal.config.model_type}",
            param="method",
        )
    return layers
