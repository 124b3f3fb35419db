"""Exact match on rows with a known answer: greedy, through transformers and PEFT, or through a running server.

The rows are chats whose last message is the answer. The same rows go both ways, so that the two scores can be compared.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import Unavailable, error_named
from adaplex_adapters.training.conversations import Chat, Example, answer_of
from adaplex_adapters.training.encoding import prompt_ids
from adaplex_adapters.training.frozen_base import FrozenBase

SPARE_TOKENS = 8
SERVED_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Score:
    """answers: what was generated, in the order of the rows."""

    matched: int
    answers: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Share of the rows answered exactly."""
        return self.matched / len(self.answers)


def answer_limit(lengths: Iterable[int]) -> int:
    """Tokens to generate for answers of these lengths, in tokens or in bytes (a token has at least one byte): an
    answer that reaches the limit is longer than every right one.
    """
    return max(lengths) + SPARE_TOKENS


def score(rows: Sequence[Chat], answers: Sequence[str]) -> Score:
    """Compare, ignoring white space around the answer."""
    pairs = zip(rows, answers, strict=True)
    return Score(sum(a.strip() == row.messages[-1].content.strip() for row, a in pairs), tuple(answers))


def evaluate_local(base: FrozenBase, rows: Sequence[Chat], batch_size: int = 16) -> Score:
    """Greedy answers of `base.model` as it stands (with PEFT's layers, if it has them)."""
    return score(rows, greedy_answers(base, rows, batch_size))


def load_with_adapter(base: FrozenBase, adapter: Path) -> FrozenBase:
    """The base with a PEFT folder's LoRA put into it by PEFT itself (in float32); `base.model` is changed."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(adapter))
    return dataclasses.replace(base, model=model.eval())


@torch.no_grad()
def greedy_answers(base: FrozenBase, rows: Sequence[Example], batch_size: int = 16) -> list[str]:
    """One greedy answer a row, not much longer than the right one, batched with rows of about the same length."""
    tokenizer = base.tokenizer
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    base.model.eval()
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        limit = answer_limit(len(tokenizer.encode(answer_of(rows[i]))) for i in group)
        for i, text in zip(group, _generate(base, [prompts[i] for i in group], limit), strict=True):
            answers[i] = text
    return answers


def _generate(base: FrozenBase, prompts: list[list[int]], limit: int) -> list[str]:
    """Padded on the left, because generation goes on from the last position."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=limit,
        do_sample=False,
        use_cache=True,
        pad_token_id=base.tokenizer.eos_token_id,
    )
    texts: list[str] = base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts


def evaluate_served(base_url: str, model: str, rows: Sequence[Chat], streams: int = 8) -> Score:
    """Greedy answers of a running server for the model named `model`. base_url: as for the openai client, ".../v1".

    Raises what the server answered as an error of the tree, Unavailable when it cannot be reached.
    """
    from concurrent.futures import ThreadPoolExecutor

    limit = answer_limit(len(row.messages[-1].content.encode()) for row in rows)
    with ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda row: served_answer(base_url, model, row, limit), rows))
    return score(rows, answers)


def served_answer(base_url: str, model: str, row: Chat, limit: int) -> str:
    """The greedy answer to one row over HTTP, at most `limit` tokens."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": m.role, "content": m.content} for m in row.messages[:-1]],
        "temperature": 0,
        "max_tokens": limit,
    }
    request = urllib.request.Request(
        base_url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SERVED_TIMEOUT_S) as response:
            answer: str = json.load(response)["choices"][0]["message"]["content"]
            return answer
    except urllib.error.HTTPError as error:
        raise error_named("InternalError", f"the server answered {error.code}: {error.read()[:500]!r}") from error
    except urllib.error.URLError as error:
        raise Unavailable(f"no server answers at {base_url}: {error.reason}") from error
