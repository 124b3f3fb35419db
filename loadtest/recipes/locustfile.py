"""Locust against Adaplex: streams, time to first token as a metric of its own, adapters by a Zipf law.

    pip install locust
    locust -f loadtest/recipes/locustfile.py --host http://127.0.0.1:8000 --headless -u 32 -r 8 -t 2m

A closed loop: each user waits for its answer, so overload shows as fewer requests and not as waiting ones. For arrivals
that do not wait use `python -m adaplex_loadtest run`.
"""

import random
import time

import orjson
from locust import HttpUser, between, events, task  # type: ignore[import-not-found]

OUTPUT_TOKENS = 64
PROMPT = "Write a long story about a lighthouse keeper, a storm and a ship that came home."


class Asker(HttpUser):
    """One client: it asks, reads the stream to its end, thinks, and asks again."""

    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        """Every model that the server lists, the first of them the most popular."""
        self.models = [model["id"] for model in self.client.get("/v1/models").json()["data"]]
        self.weights = [1 / rank for rank in range(1, len(self.models) + 1)]

    @task
    def stream(self) -> None:
        """One streamed completion; a stream that ends without its usage counts as failed."""
        (model,) = random.choices(self.models, self.weights)
        body = {
            "model": model,
            "prompt": f"{random.random()} {PROMPT}",
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first, finished = time.perf_counter(), None, False
        with self.client.post("/v1/completions", json=body, name=model, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}")
                return
            for line in answer.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                event = orjson.loads(line[6:])
                first = first or time.perf_counter()
                finished = finished or bool(event.get("usage"))
            # Locust itself counts until the headers of a stream.
            answer.request_meta["response_time"] = (time.perf_counter() - began) * 1000
            if finished and first is not None:
                answer.success()
                told = {"request_type": "first token", "name": model, "response_length": 0, "exception": None}
                events.request.fire(response_time=(first - began) * 1000, context={}, **told)
            else:
                answer.failure("the stream ended early")
