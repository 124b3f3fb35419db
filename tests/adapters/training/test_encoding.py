from __future__ import annotations

import copy
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.conversations import Chat, Completion, Message
from adaplex_adapters.training.encoding import IGNORED, EncodedExample, encode_example, prompt_ids

USER = Message("user", "two", False)


def chat(*messages: Message) -> Chat:
    return Chat(1, messages)


def answer(text: str, learned: bool = True) -> Message:
    return Message("assistant", text, learned)


def learned_texts(encoded: EncodedExample, tokenizer: Any) -> list[str]:
    """Each run of learned tokens, decoded."""
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_only_the_answer_and_its_end_are_learned(tokenizer: Any) -> None:
    encoded = encode_example(chat(USER, answer("2")), tokenizer)
    assert learned_texts(encoded, tokenizer) == ["2<|im_end|>"]
    assert all(label in (IGNORED, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))


def test_the_template_is_applied_exactly_once(tokenizer: Any) -> None:
    """Ids are those of the whole rendering, with one system turn and no second begin-of-text."""
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = encode_example(chat(USER, answer("2")), tokenizer)
    assert list(encoded.ids) == tokenizer.encode(whole, add_special_tokens=False)
    assert tokenizer.decode(encoded.ids) == whole
    assert whole.count("<|im_start|>system") == 1


def test_the_context_is_what_serving_would_send(tokenizer: Any) -> None:
    example = chat(USER, answer("2"))
    encoded = encode_example(example, tokenizer)
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two"}], tokenize=False, add_generation_prompt=True
    )
    assert list(encoded.ids[:first]) == prompt_ids(example, tokenizer)
    assert tokenizer.decode(encoded.ids[:first]) == asked


def test_several_answers_and_those_that_are_context(tokenizer: Any) -> None:
    example = chat(USER, answer("one"), USER, answer("wrong", learned=False), USER, answer("three"))
    encoded = encode_example(example, tokenizer)
    assert learned_texts(encoded, tokenizer) == ["one<|im_end|>", "three<|im_end|>"]
    assert "wrong<|im_end|>" in tokenizer.decode(encoded.ids)


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place(tokenizer: Any) -> None:
    encoded = encode_example(chat(USER, answer("two")), tokenizer)
    assert learned_texts(encoded, tokenizer) == ["two<|im_end|>"]
    assert encoded.labels[-2] != IGNORED and encoded.labels[-1] == IGNORED  # "\n" after the end is never generated


def test_plain_completions_end_with_the_end_token(tokenizer: Any) -> None:
    encoded = encode_example(Completion(1, "two is ", "2"), tokenizer)
    assert learned_texts(encoded, tokenizer) == ["2<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "two is 2<|im_end|>"


def test_a_template_that_does_not_close_the_turn_gets_the_end_token(tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned_texts(encode_example(chat(USER, answer("2")), plain), plain) == ["2\n<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(InvalidRequest, match="rewrites earlier turns"):
        encode_example(chat(USER, answer("2")), rewriting)


def test_what_the_template_refuses_is_told_with_its_line(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InvalidRequest, match=r"line 1: .*no system role"):
        encode_example(chat(USER, answer("2")), strict)
    strict.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        encode_example(chat(USER, answer("2")), strict)
