"""Options as users write them (flags, TOML, the JSON of a job, names of TRL, Transformers and PEFT) to `TrainOptions`.

Nothing is ignored silently: a name is an option, a known setting that this trainer cannot differ from (then only that
value is taken), or an error that names the nearest option.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.options import TrainOptions

FIELDS = {field.name: field for field in dataclasses.fields(TrainOptions)}
_TYPES = typing.get_type_hints(TrainOptions)
_NAMES = {alias: name for name, field in FIELDS.items() for alias in (name, *field.metadata["names"])}

# Settings of examples for other trainers which say what this one does anyway: any other value is refused.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "do_train": (True,),
    "do_eval": (True, False),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "completion_only_loss": (True, None),
    "assistant_only_loss": (True, False, None),
    "dataset_text_field": ("text",),
    "remove_unused_columns": (True, False),
    "group_by_length": (True, False),
    "greater_is_better": (None,),
    "inference_mode": (False,),
    "dataloader_num_workers": (0,),
    "logging_strategy": ("steps",),
    "padding_free": (False,),
    "gradient_checkpointing_kwargs": (None, {"use_reentrant": False}),
}
# Values of other trainers -> ours, by option.
_VALUES: Mapping[str, Mapping[Any, Any]] = {
    "method": {
        "prompt": "prompt_tuning",
        "ptuning": "p_tuning",
        "prefix": "prefix_tuning",
        "adapter": "bottleneck",
        "qlora": "lora",
    },
    "init": {True: "default", "true": "default", "pissa_niter_16": "pissa"},
    "quantize": {"fp16": "none", "bf16": "none", "dense": "none"},
    "precision": {
        "bfloat16": "bf16",
        "torch.bfloat16": "bf16",
        "float16": "fp16",
        "torch.float16": "fp16",
        "float32": "fp32",
        "torch.float32": "fp32",
        "no": "fp32",
    },
    "schedule": {"constant_with_warmup": "constant"},
    "optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "paged_adamw_32bit": "paged_adamw",
        "pagedadamw32bit": "paged_adamw",
        "pagedadamw8bit": "paged_adamw_8bit",
        "pagedadam32bit": "paged_adam",
        "paged_adam_32bit": "paged_adam",
        "pagedadam8bit": "paged_adam_8bit",
        "adamw_bnb_8bit": "adamw_8bit",
    },
    "best_by": {"eval_loss": "loss"},
}


def options_from(given: Mapping[str, Any], defaults: TrainOptions | None = None) -> TrainOptions:
    """The options that `given` names, over the defaults. Texts are read as what the option needs; "auto" and null
    leave it out.

    Raises InvalidRequest naming the option.
    """
    found: dict[str, Any] = {}
    for name, value in _spelled_out(given):
        option = _NAMES.get(name)
        if option is None:
            raise InvalidRequest(f"there is no option {name!r}{_nearest(name)}", param=name)
        if value is None or (value == "auto" and "auto" not in FIELDS[option].metadata["choices"]):
            continue
        converted = _convert(option, name, value)
        if option in found and found[option] != converted:
            raise InvalidRequest(
                f"{name} says {value!r}, but {option} was already given as {found[option]!r}", param=name
            )
        found[option] = converted
    return dataclasses.replace(defaults or TrainOptions(), **found)


def known_names() -> set[str]:
    """Every name that `options_from` takes."""
    return {*_NAMES, *_TRANSLATED, *_FIXED}


def is_switch(name: str) -> bool:
    """Whether a name stands for yes or no."""
    if name in _NAMES:
        return bool in (_TYPES[_NAMES[name]], *typing.get_args(_TYPES[_NAMES[name]]))
    return name in ("load_in_4bit", "load_in_8bit", "bf16", "fp16") or True in _FIXED.get(name, ())


def plain_options(options: TrainOptions) -> dict[str, Any]:
    """The options that differ from the defaults, as JSON has them."""
    plain = TrainOptions()
    changed = {n: getattr(options, n) for n in FIELDS if getattr(options, n) != getattr(plain, n)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _spelled_out(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names with underscores; settings that stand for an option in other words are translated."""
    for raw, value in given.items():
        name = raw.replace("-", "_").removeprefix("__")
        if name in _FIXED:
            texts = tuple(str(fixed).lower() for fixed in _FIXED[name])
            if value not in _FIXED[name] and str(value).lower() not in texts:
                wanted = " or ".join(map(repr, _FIXED[name]))
                raise InvalidRequest(f"{name} can only be {wanted} here, not {value!r}", param=name)
        elif name in _TRANSLATED:
            yield from _TRANSLATED[name](value)
        else:
            yield name, value


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "yes", "1", "false", "no", "0"):
        return value.lower() in ("true", "yes", "1")
    if isinstance(value, bool):
        return value
    raise InvalidRequest(f"{name} must be true or false, not {value!r}", param=name)


def _load_in(bits: int) -> Callable[[Any], Iterator[tuple[str, Any]]]:
    def translate(value: Any) -> Iterator[tuple[str, Any]]:
        if _flag(f"load_in_{bits}bit", value) and bits == 8:
            yield "quantize", "int8"

    return translate


def _half(name: str) -> Callable[[Any], Iterator[tuple[str, Any]]]:
    def translate(value: Any) -> Iterator[tuple[str, Any]]:
        if _flag(name, value):
            yield "precision", name

    return translate


def _report_to(value: Any) -> Iterator[tuple[str, Any]]:
    names = [value] if isinstance(value, str) else list(value or ["none"])
    if not set(names) <= {"none", "tensorboard"}:
        raise InvalidRequest(f"report_to can only be none or tensorboard, not {value!r}", param="report_to")
    yield "tensorboard", "tensorboard" in names


def _method(value: Any) -> Iterator[tuple[str, Any]]:
    """DoRA and rsLoRA are LoRA with a switch."""
    kind = value.lower().replace("-", "_") if isinstance(value, str) else value
    if kind in ("dora", "rslora"):
        yield kind, True
        kind = "lora"
    yield "method", kind


_TRANSLATED: Mapping[str, Callable[[Any], Iterator[tuple[str, Any]]]] = {
    "load_in_4bit": _load_in(4),
    "load_in_8bit": _load_in(8),
    "bf16": _half("bf16"),
    "fp16": _half("fp16"),
    "report_to": _report_to,
    "method": _method,
    "peft_type": _method,
}


def _convert(option: str, name: str, value: Any) -> Any:
    known = _VALUES.get(option, {})
    key = value.lower() if isinstance(value, str) else value
    if isinstance(key, str | bool) and key in known:
        return known[key]
    kind = _TYPES[option]
    if kind == tuple[str, ...]:
        return _texts(name, value)
    wanted = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))
    if wanted is bool:
        return _flag(name, value)
    if wanted is str:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be text, not {value!r}", param=name)
        return value.lower() if FIELDS[option].metadata["choices"] else value
    return _number(name, value, wanted)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
        return tuple(part.strip() for part in parts)
    raise InvalidRequest(f"{name} must be text or a list of texts, not {value!r}", param=name)


def _number(name: str, value: Any, wanted: type) -> Any:
    kind = "a whole number" if wanted is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidRequest(f"{name} must be {kind}, not {value!r}", param=name)
    try:
        number = float(value)
        if wanted is int and number != int(number):
            raise ValueError
        return wanted(number)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name} must be {kind}, not {value!r}", param=name) from error


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, [*_NAMES, *_TRANSLATED], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the options are {', '.join(FIELDS)}"
