"""A trainer that does as the options say: counts steps in a checkpoint, and ends in the way that is asked for."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
options = job["options"]
lock = (folder / "lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
state = folder / "step"
begun = int(state.read_text()) if state.exists() else 0
stopped = False


def tell(kind: str, **fields: object) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n")


def on_term(*_: object) -> None:
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, on_term)
tell("message", message=f"from step {begun}")
for step in range(begun + 1, options.get("steps", 3) + 1):
    time.sleep(options.get("pace", 0.01))
    tell("metrics", step=step, loss=1 / step, tokens=10 * step, seconds_left=1.0)
    state.write_text(str(step))
    tell("checkpoint", step=step, metrics={"loss": 1 / step})
    if options.get("crash") == step and not (folder / "crashed").exists():
        (folder / "crashed").write_text("once")
        os.kill(os.getpid(), signal.SIGKILL)
    if options.get("crash") == "always":
        sys.exit("no reason")
    if stopped:
        sys.exit(75)
if options.get("refuse"):
    tell("failed", code="invalid_value", message="line 3 is not JSON", param="training_file")
    sys.exit(3)
(folder / "result").mkdir(exist_ok=True)
(folder / "result" / "report.html").write_text("<p>fine")
tell("done", trained_tokens=1000, better_than_base=not options.get("worse"), files=["report.html"])
