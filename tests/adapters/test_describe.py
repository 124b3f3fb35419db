from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.describe import check_adapter


def test_a_good_adapter(write_lora: Any, base: BaseShape) -> None:
    report = check_adapter(write_lora(config={"alpha_pattern": {"v_proj": 4}}), base)
    assert report.spec is not None and report.spec.rank == 4 and report.modules == 4
    assert report.ranks == (4,) and report.scalings == (1.0, 2.0)
    assert report.problems == () and report.warnings == ()


def test_every_problem_is_told(write_lora: Any, base: BaseShape, tmp_path: Path) -> None:
    report = check_adapter(write_lora(config={"use_qalora": True, "bias": "some"}), base)
    assert report.spec is None and len(report.problems) == 2
    report = check_adapter(write_lora(config={"target_modules": ["q_proj", "v_proj", "up_proj"]}), base)
    assert report.spec is not None and len(report.problems) == 2 and "up_proj" in report.problems[0]
    assert check_adapter(write_lora(config={"target_modules": ["q_proj", "v_proj", "up_proj"]}), None).problems == ()
    assert "no adapter folder" in check_adapter(tmp_path / "nowhere", base).problems[0]


def test_what_does_nothing_is_warned_of(write_lora: Any, base: BaseShape) -> None:
    def zero_one(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for key, tensor in tensors.items() if "lora_B" in key).zero_()

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    assert check_adapter(write_lora(change=zero_one), base).warnings[0].startswith("1 of 4")
    assert "does nothing" in check_adapter(write_lora(change=zero), base).warnings[0]
