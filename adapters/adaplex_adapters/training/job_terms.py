"""What the process of a job (`job`) and whoever starts it agree on: names in the job's folder, and exit codes.

Imports nothing, so that a server that only watches the process need not load a trainer.
"""

from __future__ import annotations

JOB, EVENTS, RESULT = "job.json", "events.jsonl", "result"
VERSION = 1
"""Of job.json."""

SUCCEEDED, FAILED, REFUSED, PAUSED = 0, 1, 2, 3
"""Exit codes. REFUSED: another process works on the folder, or job.json cannot be read; no event is written."""
