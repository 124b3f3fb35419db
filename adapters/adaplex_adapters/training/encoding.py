"""From an example to token ids and the mask of what is learned.

The chat template is applied to text once and the ids are never wrapped again, so no second begin-of-text token
appears. Templates without generation marks (SmolLM2's, most others) do not say which tokens are the answer; here a
message's answer is what the rendering grows by beyond the rendering of everything before it with the generation
prompt. Context and answers are tokenized separately: at serving time the prompt is tokenized alone, and training must
see the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.conversations import Chat, Completion, Example, Message, PlainText

IGNORED = -100
"""The label of a token that does not count in the loss (torch's own default for cross entropy)."""


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class EncodedExample:
    """ids and labels have one length; labels[i] is ids[i] where learned and IGNORED elsewhere (not shifted).

    parts: lengths of the examples that a packed row consists of.
    """

    line: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels)


def encode_example(example: Example, tokenizer: ChatTokenizer) -> EncodedExample:
    """Ids with labels on the answers alone, each answer with the token that ends it.

    Raises InvalidRequest where the template cannot be taken apart or does not accept the roles.
    """
    if isinstance(example, PlainText):
        ids = _plain_ids(example, tokenizer)
        return EncodedExample(example.line, tuple(ids), tuple(ids))
    segments = (
        _completion_segments(example, tokenizer) if isinstance(example, Completion) else _chat(example, tokenizer)
    )
    ids = []
    labels: list[int] = []
    for segment_ids, segment_labels in segments:
        ids += segment_ids
        labels += segment_labels
    return EncodedExample(example.line, tuple(ids), tuple(labels))


def prompt_ids(example: Example, tokenizer: ChatTokenizer) -> list[int]:
    """The ids from which the last learned answer is to be generated."""
    if isinstance(example, Completion):
        return tokenizer.encode(example.prompt, add_special_tokens=True)
    assert isinstance(example, Chat)
    last = max(i for i, m in enumerate(example.messages) if m.learned)
    return tokenizer.encode(render(tokenizer, example.messages[:last], answer_next=True), add_special_tokens=False)


def render(tokenizer: ChatTokenizer, messages: tuple[Message, ...], answer_next: bool) -> str:
    """The conversation as the chat template writes it."""
    if not getattr(tokenizer, "chat_template", True):
        raise InvalidRequest("the base has no chat template; use prompt/completion rows", param="data")
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer_next)
    return text


def _plain_ids(example: PlainText, tokenizer: ChatTokenizer) -> list[int]:
    """As the tokenizer encodes a text, with the token that ends it."""
    ids = tokenizer.encode(example.text, add_special_tokens=True)
    return ids if ids[-1:] == _end(tokenizer) else ids + _end(tokenizer)


def _completion_segments(example: Completion, tokenizer: ChatTokenizer) -> list[tuple[list[int], list[int]]]:
    context = tokenizer.encode(example.prompt, add_special_tokens=True)
    answer = tokenizer.encode(example.completion, add_special_tokens=False) + _end(tokenizer)
    return [(context, [IGNORED] * len(context)), (answer, answer)]


def _chat(example: Chat, tokenizer: ChatTokenizer) -> list[tuple[list[int], list[int]]]:
    segments: list[tuple[list[int], list[int]]] = []
    done = ""
    for i, message in enumerate(example.messages):
        if not message.learned:
            continue
        before = _render_checked(tokenizer, example, i, answer_next=True)
        through = _render_checked(tokenizer, example, i + 1, answer_next=False)
        if not before.startswith(done) or not through.startswith(before):
            raise InvalidRequest(
                f"line {example.line}: the base's chat template rewrites earlier turns, so the answer of message {i} "
                "cannot be told from its context; split the conversation into one row per answer",
                param="data",
            )
        context = tokenizer.encode(before[len(done) :], add_special_tokens=False)
        segments.append((context, [IGNORED] * len(context)))
        segments.append(_answer(tokenizer, through[len(before) :]))
        done = through
    return segments


def _answer(tokenizer: ChatTokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of an answer as rendered, learned up to the special token that ends the turn; what follows it is context."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    ends = [i for i, token in enumerate(ids) if token in special]
    if not ends:
        ids += _end(tokenizer)
        return ids, list(ids)
    learned = ends[-1] + 1
    return ids, ids[:learned] + [IGNORED] * (len(ids) - learned)


def _end(tokenizer: ChatTokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _render_checked(tokenizer: ChatTokenizer, example: Chat, count: int, answer_next: bool) -> str:
    import jinja2

    try:
        return render(tokenizer, example.messages[:count], answer_next)
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"line {example.line}: the base's chat template refuses it: {error}", param="data"
        ) from error
