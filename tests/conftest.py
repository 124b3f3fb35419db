"""What all tests share: `tests/` is importable, so that they can say `from support.x import y`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
