"""Which options a client may give a job: what the trainer would refuse is refused before the job is queued, and so is
what would run code of the client's choice. Owns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.metrics import METRICS
from adaplex_adapters.training.option_names import options_from

_PLAIN = (str, int, float, bool, type(None))


def check_options(given: Mapping[str, Any]) -> None:
    """Raises InvalidRequest naming the option."""
    for name, value in given.items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
        # Before anything else looks at them: what is nested deeply breaks whoever copies or prints it.
        if not all(isinstance(one, _PLAIN) for one in held):
            raise InvalidRequest(f"the option {name[:60]!a} must be text, a number or a list of them", param=name[:60])
    for metric in options_from(given).metrics:
        # "module:function" would import and call whatever is installed here: that is for whoever runs the trainer.
        if metric not in METRICS:
            raise InvalidRequest(f"there is no metric {metric[:60]!a}; use {', '.join(METRICS)}", param="metrics")
