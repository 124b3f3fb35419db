"""What may be chosen about a training run: each option once, with its text, its bounds and the names that users of
TRL, Transformers and PEFT know it by. Checked when built; owns nothing.

`option_names` reads options from flags, TOML and JSON; `server` makes its flags from the fields' metadata.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.errors import InvalidRequest

ALL_LINEAR = "all-linear"
MAX_RANK = 256

LORA, PROMPT, P_TUNING, PREFIX, IA3, BOTTLENECK = (
    "lora",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "ia3",
    "bottleneck",
)
METHODS = (LORA, PROMPT, P_TUNING, PREFIX, IA3, BOTTLENECK)
SOFT_PROMPTS = (PROMPT, P_TUNING, PREFIX)

ADAPTER, BASE, COURSE, DATA, WATCH = "Adapter", "Base", "Training", "Data", "Evaluation and checkpoints"


def _option(
    default: Any,
    group: str,
    text: str,
    names: str = "",
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """One field: its help text, its other names, and what it may be (None always means "not given")."""
    metadata = {"help": text, "group": group, "names": tuple(names.split()), "within": within, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Defaults are meant to work untouched; a None is derived from the base, the method or the device.

    A step is one update of the weights: `accumulation` forward passes over `batch_size` rows each.
    """

    method: str = _option(LORA, ADAPTER, "Kind of adapter.", "peft_type", choices=METHODS)
    rank: int = _option(8, ADAPTER, "Rank of the LoRA.", "r lora_r lora_rank", within=(1, MAX_RANK))
    alpha: float | None = _option(
        None, ADAPTER, "Scaling is alpha / rank; twice the rank if not given.", "lora_alpha", within=(1e-3, 1e5)
    )
    rslora: bool = _option(False, ADAPTER, "Scale by alpha / sqrt(rank).", "use_rslora")
    dora: bool = _option(False, ADAPTER, "Learn magnitudes and directions apart (DoRA).", "use_dora")
    init: str = _option(
        "default",
        ADAPTER,
        "First weights: default (B is zero), gaussian, pissa (the base's largest singular values) or loftq (what "
        "quantizing a dense base lost).",
        "init_lora_weights",
        choices=("default", "gaussian", "pissa", "loftq"),
    )
    targets: tuple[str, ...] = _option(
        (ALL_LINEAR,),
        ADAPTER,
        "Modules to adapt, as q_proj,v_proj; all-linear for all. IA3 takes its own choice for all-linear.",
        "target_modules lora_target_modules",
    )
    feedforward_targets: tuple[str, ...] = _option(
        (), ADAPTER, "IA3: those targets whose input is scaled, not their output.", "feedforward_modules"
    )
    dropout: float = _option(0.0, ADAPTER, "Dropout before the adapter.", "lora_dropout", within=(0, 0.95))
    virtual_tokens: int = _option(
        20, ADAPTER, "Soft prompts: their length in tokens.", "num_virtual_tokens", within=(1, 4096)
    )
    prompt_init_text: str | None = _option(
        None,
        ADAPTER,
        "Prompt and prefix tuning: begin as this text (else as random tokens).",
        "prompt_tuning_init_text",
    )
    prefix_projection: bool = _option(False, ADAPTER, "Prefix tuning: learn the prefix through an MLP.")
    encoder_hidden_size: int | None = _option(
        None, ADAPTER, "Width of the MLP behind P-tuning and projected prefixes.", within=(1, 65536)
    )
    reduction_factor: float = _option(
        16.0, ADAPTER, "Bottleneck: the base's width over the bottleneck's.", within=(1, 4096)
    )
    bottleneck_place: str = _option(
        "pfeiffer",
        ADAPTER,
        "Bottleneck: after the MLP (pfeiffer), or after attention and MLP (houlsby).",
        choices=("pfeiffer", "houlsby"),
    )

    quantize: str = _option(
        "auto",
        BASE,
        "How a dense base is kept: auto (nf4), none, nf4, fp4 or int8. A quantized base stays as it is.",
        "bnb_4bit_quant_type",
        choices=("auto", "none", "nf4", "fp4", "int8"),
    )
    double_quant: bool = _option(
        True, BASE, "Quantize the scales of nf4 and fp4 once more.", "bnb_4bit_use_double_quant"
    )
    precision: str = _option(
        "auto",
        BASE,
        "Arithmetic of the forward pass; the adapter's weights and updates are always float32.",
        "bnb_4bit_compute_dtype mixed_precision torch_dtype dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    gradient_checkpointing: bool | None = _option(
        None,
        BASE,
        "Compute activations again in the backward pass; on a GPU the default.",
        "use_gradient_checkpointing",
    )
    upcast_base: bool = _option(
        False, BASE, "Keep norms, embeddings and head in float32, as PEFT's prepare_model_for_kbit_training does."
    )

    learning_rate: float | None = _option(
        None, COURSE, "Highest learning rate; if not given, it follows from method and width.", "lr", within=(1e-9, 10)
    )
    learning_rate_multiplier: float = _option(1.0, COURSE, "Multiplies the learning rate.", within=(1e-6, 1e6))
    epochs: float | None = _option(
        None,
        COURSE,
        "Passes over the data; if not given, 3, or as many as max_steps needs.",
        "num_train_epochs n_epochs",
        within=(0.001, 10_000),
    )
    max_steps: int | None = _option(None, COURSE, "Updates at most.", within=(1, 10**9))
    batch_size: int = _option(
        8, COURSE, "Rows a forward pass.", "per_device_train_batch_size train_batch_size", within=(1, 4096)
    )
    accumulation: int = _option(1, COURSE, "Forward passes an update.", "gradient_accumulation_steps", within=(1, 4096))
    schedule: str = _option(
        "cosine",
        COURSE,
        "Learning rate after the warm-up.",
        "lr_scheduler_type lr_scheduler",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = _option(
        0.05,
        COURSE,
        "Rising rate at the beginning: a share of the steps if below 1, else their number.",
        "warmup_ratio warmup_steps",
        within=(0, 10**9),
    )
    optimizer: str = _option(
        "auto",
        COURSE,
        "auto is adamw; paged state can leave a GPU, _8bit keeps it in 8 bits. On a CPU the plain forms run.",
        "optim",
        choices=(
            "auto",
            "adamw",
            "adam",
            "paged_adamw",
            "paged_adam",
            "adamw_8bit",
            "adam_8bit",
            "paged_adamw_8bit",
            "paged_adam_8bit",
        ),
    )
    beta1: float = _option(0.9, COURSE, "Adam's decay of the mean.", "adam_beta1", within=(0, 0.99999))
    beta2: float = _option(0.999, COURSE, "Adam's decay of the variance.", "adam_beta2", within=(0, 0.9999999))
    epsilon: float = _option(1e-8, COURSE, "Adam's epsilon.", "adam_epsilon", within=(1e-12, 1))
    weight_decay: float = _option(0.0, COURSE, "Of the optimizer.", within=(0, 10))
    clip: float = _option(1.0, COURSE, "Largest norm of the gradient; 0: none.", "max_grad_norm", within=(0, 1e6))
    seed: int = _option(0, COURSE, "Of split, order, first weights and dropout.", "data_seed", within=(0, 2**32 - 1))

    max_length: int = _option(
        1024,
        DATA,
        "Tokens; longer rows are left out and listed.",
        "max_seq_length max_seq_len model_max_length",
        within=(8, 1_000_000),
    )
    packing: bool = _option(False, DATA, "Put several rows into one of max_length tokens, kept apart by the mask.")
    held_out: float = _option(0.05, DATA, "Share of the prompts kept for measuring (at most 200).", within=(0, 0.9))

    eval_strategy: str = _option(
        "epoch", WATCH, "When to measure.", "evaluation_strategy", choices=("no", "steps", "epoch")
    )
    eval_steps: int = _option(100, WATCH, "Steps between measurements by steps.", within=(1, 10**9))
    eval_batch_size: int = _option(16, WATCH, "Rows a measuring pass.", "per_device_eval_batch_size", within=(1, 4096))
    metrics: tuple[str, ...] = _option(
        (), WATCH, "Of generated answers: exact_match, rouge_l, f1, or module:function.", "compute_metrics"
    )
    metric_rows: int = _option(50, WATCH, "Held-out rows that are answered for the metrics.", within=(1, 100_000))
    best_by: str = _option("loss", WATCH, "Which measurement says what is best.", "metric_for_best_model")
    keep_best: bool = _option(
        True,
        WATCH,
        "The result is the best measured checkpoint, not the last (with 5 held-out rows or more).",
        "load_best_model_at_end",
    )
    early_stopping: int | None = _option(
        None,
        WATCH,
        "Stop after so many measurements without a better one.",
        "early_stopping_patience",
        within=(1, 10**6),
    )
    early_stopping_threshold: float = _option(0.0, WATCH, "What counts as better.", within=(0, 1e6))
    save_strategy: str = _option(
        "epoch", WATCH, "When to write a checkpoint, beside those at measurements.", choices=("no", "steps", "epoch")
    )
    save_steps: int = _option(100, WATCH, "Steps between checkpoints by steps.", within=(1, 10**9))
    save_total_limit: int = _option(2, WATCH, "Checkpoints kept, beside the best.", within=(1, 10_000))
    save_only_model: bool = _option(
        False, WATCH, "Older checkpoints keep the adapter alone; the latest can always be resumed from."
    )
    logging_steps: int = _option(1, WATCH, "Steps between lines of the metrics log.", within=(1, 10**9))
    tensorboard: bool = _option(False, WATCH, "Write TensorBoard's files too (extra 'report').")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if not self.targets or not all(self.targets):
            raise InvalidRequest("targets must name at least one module", param="targets")
        for problem, param in self._contradictions():
            raise InvalidRequest(problem, param=param)

    def _contradictions(self) -> list[tuple[str, str]]:
        lora = self.method == LORA
        found = [
            (f"{name} belongs to method lora, not to {self.method}", name)
            for name, given in (("dora", self.dora), ("rslora", self.rslora), ("init", self.init != "default"))
            if given and not lora
        ]
        if self.packing and self.method in SOFT_PROMPTS:
            found.append((f"packing cannot be used with {self.method}: every row needs its own prompt", "packing"))
        if self.gradient_checkpointing and self.method == PREFIX:
            found.append(("prefix_tuning needs the cache that gradient_checkpointing turns off", "method"))
        if self.dora and self.init in ("pissa", "loftq"):
            found.append((f"dora begins at the base's own weights, so init={self.init} does not go with it", "init"))
        if self.prompt_init_text is not None and self.method not in (PROMPT, PREFIX):
            found.append(("prompt_init_text belongs to prompt_tuning and prefix_tuning", "prompt_init_text"))
        if self.best_by not in ("loss", *self.metrics):
            found.append((f"best_by is {self.best_by!r}, which is neither loss nor one of the metrics", "best_by"))
        return found

    @property
    def lora_alpha(self) -> float:
        """alpha with its default applied."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def epoch_limit(self) -> float:
        """epochs with its default applied; infinite where max_steps alone ends the run."""
        return self.epochs or (3.0 if self.max_steps is None else math.inf)

    def rate(self, hidden_size: int) -> float:
        """The highest learning rate on a base of this width."""
        found = self.learning_rate or learning_rate_for(hidden_size, self.method)
        return found * self.learning_rate_multiplier


def learning_rate_for(hidden_size: int, method: str = LORA) -> float:
    """LoRA: 2e-4 at a width of 4096 (the rate of QLoRA, Dettmers 2023, for 7B and 13B), inversely with the width, at
    most 2e-3. Methods with few weights take larger steps.

    Small bases want higher rates: with 576 wide SmolLM2, 2e-4 leaves the demo tasks half learned in the same time.
    """
    lora = min(2e-3, 2e-4 * 4096 / hidden_size)
    return {PROMPT: 1e-2, P_TUNING: 5e-4, PREFIX: 6e-3, IA3: 1e-2}.get(method, lora)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    within, choices = field.metadata["within"], field.metadata["choices"]
    if value is None:
        return
    if within is not None and not within[0] <= value <= within[1]:
        raise InvalidRequest(
            f"{field.name} must be between {within[0]:g} and {within[1]:g}, not {value}", param=field.name
        )
    if choices and value not in choices:
        raise InvalidRequest(f"{field.name} must be one of {', '.join(choices)}, not {value!r}", param=field.name)


def plain_fields(options: TrainOptions) -> dict[str, Any]:
    """Every option as JSON has it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
