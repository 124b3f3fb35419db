from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from adaplex_adapters.errors import InternalError, Unavailable
from adaplex_adapters.training.conversations import Chat, Message
from adaplex_adapters.training.evaluation import answer_limit, evaluate_served, score

ROWS = [Chat(i, (Message("user", f"say {i}", False), Message("assistant", f"{i}", True))) for i in range(10)]


class Echo(BaseHTTPRequestHandler):
    """Answers with the number it is asked to say, but 3 with white space and 4 wrongly; knows only the model "echo"."""

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"].removeprefix("say ")
        text = {"3": " 3\n", "4": "44"}.get(said, said)
        good = self.path == "/v1/chat/completions" and asked["model"] == "echo" and asked["temperature"] == 0
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200 if good else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_served_answers_are_scored_in_the_order_of_the_rows(url: str) -> None:
    found = evaluate_served(url, "echo", ROWS, streams=4)
    assert found.matched == 9 and found.rate == 0.9
    assert found.answers == tuple({"3": " 3\n", "4": "44"}.get(str(i), str(i)) for i in range(10))


def test_a_refusal_and_a_missing_server_are_errors_not_wrong_answers(url: str) -> None:
    with pytest.raises(InternalError, match="404"):
        evaluate_served(url, "other", ROWS[:1])
    with pytest.raises(Unavailable):
        evaluate_served("http://127.0.0.1:9/v1", "echo", ROWS[:1])


def test_scoring_needs_an_answer_for_every_row() -> None:
    with pytest.raises(ValueError):
        score(ROWS, ["0"])
    assert answer_limit([1, 5, 3]) > 5
