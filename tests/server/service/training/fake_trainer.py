"""A trainer that does as the options say: counts steps in a checkpoint, and ends in the way that is asked for.

It speaks as `adaplex_adapters.training.events` does.
"""

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
        file.write(json.dumps({"seq": 1, "at": time.time(), "type": kind, **fields}) + "\n")


def on_term(*_: object) -> None:
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, on_term)
if options.get("once") and (folder / "result").exists():
    sys.exit(0)
tell("started", pid=os.getpid(), resumed_step=begun or None)
tell("message", text=f"from step {begun}")
for step in range(max(1, begun), options.get("steps", 3) + 1):  # the last step before a crash is told again
    time.sleep(options.get("pace", 0.01))
    tell("step", step=step, steps=3, loss=1 / step, tokens=10, seconds_left=1.0)
    tell("evaluation", step=step, loss=1 / step, perplexity=2.0, metrics={"exact_match": 0.5}, best=True)
    (folder / "step.new").write_text(str(step))
    (folder / "step.new").rename(state)
    tell("checkpoint", step=step, path=f"checkpoints/step-{step}")
    if options.get("crash") == step and not (folder / "crashed").exists():
        (folder / "crashed").write_text("once")
        os.kill(os.getpid(), signal.SIGKILL)
    if options.get("crash") == "always":
        sys.exit("no reason")
    if stopped:
        tell("paused", step=step)
        sys.exit(3)
if options.get("refuse"):
    tell("failed", error="InvalidRequest", message="line 3 is not JSON", param="training_file")
    sys.exit(1)
(folder / "result").mkdir(exist_ok=True)
(folder / "result" / "report.html").write_text("<p>fine")
after = 3.0 if options.get("worse") else 1.0
tell("succeeded", result={"tokens": 1000, "held_out_before": 2.0, "held_out_after": after, "out": "result"})
