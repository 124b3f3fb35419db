"""The console in a real browser against the real server: what a person would see and do, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, running_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "examples" / "date-iso" / "adapter"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as made:
        if found is None and not Path(made.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        browser = made.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: RunningServer) -> Iterator[Any]:
    """The console; a script error, or a refusal of the page's own policy, fails the test."""
    page = browser.new_page(color_scheme="dark")
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
    page.goto(server.http)
    page.wait_for_selector("#adapter-rows tr[data-name='date-iso']")
    yield page
    page.close()
    assert wrong == []


def test_adapters_are_shown_with_their_state(page: Any) -> None:
    names = page.eval_on_selector_all("#adapter-rows tr", "rows => rows.map(row => row.dataset.name)")
    assert {"date-iso", "itn-en", "tsql-postgres"} <= set(names) and len(names) >= 4
    assert page.inner_text("#server").startswith("serves ")
    assert page.locator("#problem").is_hidden()


def test_a_chat_compares_both_by_keyboard_alone(page: Any) -> None:
    page.select_option("select[name=adapter]", "date-iso")
    page.fill("input[name=tokens]", "12")
    page.focus("#prompt")
    page.keyboard.type("the third of May 2021")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".figures", has_text="tokens in")).to_have_count(2, timeout=60_000)
    said = page.locator("#adapter-turns .assistant").inner_text()
    assert re.fullmatch(r"2021-05-\d\d", said) and said != page.locator("#base-turns .assistant").inner_text()
    assert page.evaluate("document.activeElement.id") == "prompt"
    first_token = page.locator("tr[data-name='date-iso'] td").nth(3)
    playwright.expect(first_token).to_contain_text("ms", timeout=10_000)


def test_everything_can_be_reached_with_tab(page: Any) -> None:
    page.evaluate("document.body.focus()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
    assert {"skip", "key", "name", "files", "adapter", "tokens", "prompt", "send", "file"} <= reached


def test_an_adapter_is_uploaded_and_removed(page: Any) -> None:
    page.fill("#upload-form input[name=name]", "uploaded")
    files = [str(path) for path in DEMO.iterdir() if path.name.startswith("adapter_")]
    page.set_input_files("#upload-form input[name=files]", files)
    page.click("#upload-form button")
    row = page.wait_for_selector("tr[data-name='uploaded']")
    assert page.inner_text("#upload-form output") == "uploaded is served."
    button = row.query_selector("button")
    button.click()
    assert button.inner_text() == "Really remove?"
    button.click()
    page.wait_for_selector("tr[data-name='uploaded']", state="detached")


def test_what_is_wrong_is_said_in_the_servers_words(page: Any) -> None:
    page.fill("#upload-form input[name=name]", "broken")
    page.set_input_files("#upload-form input[name=files]", {"name": "x.txt", "mimeType": "text/plain", "buffer": b"x"})
    page.click("#upload-form button")
    page.wait_for_selector("#problem:not([hidden])")
    assert "adapter_config.json" in page.inner_text("#problem")


def test_both_colour_schemes_have_enough_contrast(page: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, of all pairs that the style sheet sets."""
    pairs = [("--ink", "--ground"), ("--ink", "--raised"), ("--quiet", "--ground"), ("--quiet", "--raised")]
    pairs += [("--on-accent", "--accent"), ("--accent", "--ground"), ("--bad", "--ground"), ("--good", "--ground")]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink, ground in pairs:
            read = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
            assert contrast(page.evaluate(read, ink), page.evaluate(read, ground)) >= 4.5, (scheme, ink, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_key_is_asked_for_and_kept_for_the_session(browser: Any, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "adaplex_server", "keys", "create", "console", "--data-dir", str(tmp_path / "data"),
         "--verbs", "generate,adapters,train,observe"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    secret = next(word for word in made.stdout.split() if word.startswith("adx_"))
    with running_server(tmp_path) as server:
        page = browser.new_page()
        page.goto(server.http)
        page.wait_for_selector("#problem:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type(secret)
        page.keyboard.press("Enter")
        page.wait_for_selector("#adapter-rows tr[data-name='date-iso']")
        page.reload()
        page.wait_for_selector("#adapter-rows tr[data-name='date-iso']")
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
        page.close()


def test_a_job_is_started_and_its_curve_drawn(page: Any) -> None:
    """A few steps on the embedded base, then cancelled."""
    rows = "\n".join(
        json.dumps({"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]})
        for i in range(40)
    )
    page.fill("#train-form input[name=name]", "from-console")
    page.set_input_files(
        "#train-form input[name=file]", {"name": "rows.jsonl", "mimeType": "application/jsonl", "buffer": rows.encode()}
    )
    page.click("#train-form button")
    page.wait_for_selector("#jobs li:has-text('from-console')")
    page.wait_for_selector("#curve path.train[d*=L]", timeout=120_000)
    assert "Loss by step" in page.locator("#curve-title").text_content()
    cancel = page.locator("#jobs li:has-text('from-console') button:has-text('ancel')")
    cancel.click()
    cancel.click()
    page.wait_for_selector("#jobs li:has-text('cancelled')")
