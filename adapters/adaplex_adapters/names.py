"""Which names an adapter may have. A name is never a path: it cannot leave a folder, hide, or look like an option."""

from __future__ import annotations

import re

from adaplex_adapters.errors import InvalidRequest

MAX_NAME_LENGTH = 96
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: object) -> str:
    """`name` itself if it may name an adapter; InvalidRequest (param "name") with the rule that it breaks otherwise."""
    if not isinstance(name, str):
        raise InvalidRequest(f"An adapter's name is text, not {type(name).__name__}.", param="name")
    if not name:
        raise InvalidRequest("An adapter's name must not be empty.", param="name")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(
            f"An adapter's name has at most {MAX_NAME_LENGTH} characters; this one has {len(name)}.", param="name"
        )
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{name!a} cannot name an adapter: use letters, digits, '.', '_' and '-', begin with a letter or a digit, "
            "and do not write '..'.",
            param="name",
        )
    return name
