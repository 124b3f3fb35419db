"""From a constraint to a grammar of llguidance (https://github.com/guidance-ai/llguidance), and what is too much.

The library walks a lexer of derivatives and an Earley parser beside the answer, so that a grammar is ready in about a
millisecond. Everything in it is bounded by the limits below: how much it builds, and what one token may cost.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.vocabulary import Constraint

MAX_CONSTRAINT_CHARS = 256 << 10
_SHOWN_CHARS = 400

LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""About 0.4 s to build, 15 ms a token and 100 MB, at the very most."""

_JSON_SPACE = r"( |\n {0,32})"
"""Between the tokens of JSON: compact, on one line, or indented; but a model cannot go on with spaces for ever."""


def grammar_of(constraint: Constraint) -> str:
    """The grammar in llguidance's own form, unchecked but for its size. Raises InvalidRequest."""
    if len(constraint.text) > MAX_CONSTRAINT_CHARS:
        raise InvalidRequest(
            f"the constraint has {len(constraint.text)} characters, at most {MAX_CONSTRAINT_CHARS} are taken"
        )
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    try:
        return LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_pattern": _JSON_SPACE})
    except ValueError as error:
        raise InvalidRequest(f"the JSON schema cannot be read: {error!s:.{_SHOWN_CHARS}}") from None


def check_constraint(constraint: Constraint) -> None:
    """Raises InvalidRequest if no grammar can be made of it. Takes up to half a second."""
    problem = LLMatcher.validate_grammar(grammar_of(constraint), None, limits=LIMITS)
    # A warning is for a grammar that works.
    if problem and not problem.startswith("WARNING"):
        raise _refusal(constraint, problem)


def build_matcher(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """A matcher at its beginning, to be copied for each answer. Raises InvalidRequest."""
    matcher = LLMatcher(tokenizer, grammar_of(constraint), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _refusal(constraint, matcher.get_error())
    return matcher


def _refusal(constraint: Constraint, problem: str) -> InvalidRequest:
    what = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}[constraint.kind]
    return InvalidRequest(f"the {what} cannot be used: {problem.strip():.{_SHOWN_CHARS}}")
