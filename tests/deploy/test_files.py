"""What can be said of the files in deploy/ without a server."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from monitoring import DEPLOY, MISSING, PROMTOOL, panels, rules

RUNBOOK = (DEPLOY.parent / "docs" / "runbook.md").read_text()


def test_dashboards_are_what_their_source_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY / "grafana"))
    import make_dashboards

    for path, text in make_dashboards.files().items():
        assert path.read_text() == text, f"run {make_dashboards.__file__}"
    assert len(panels()) > 40


def test_every_alert_has_a_page_in_the_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOK, re.M)}
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in headings and rule["labels"]["severity"] in ("critical", "warning")


def test_no_page_is_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (Adaplex\w+)$", RUNBOOK, re.M)) == {rule["alert"] for rule in rules()}


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    folders = [mount for mount in mounts if mount.startswith("./")]
    assert len(folders) == 3 and all((DEPLOY / folder).is_dir() for folder in folders)


def test_variables_of_compose_are_settings() -> None:
    from adaplex_server.settings import load_settings

    environment = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["adaplex"]["environment"]
    assert load_settings(None, environment, {}).http == "0.0.0.0:8000"


@pytest.mark.skipif(PROMTOOL is None, reason=MISSING)
@pytest.mark.parametrize(
    "check", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts.test.yml"]
)
def test_promtool(check: str) -> None:
    """The last one lets every alert fire, and none too early."""
    assert PROMTOOL is not None
    folder = DEPLOY / "prometheus"
    checked = subprocess.run([PROMTOOL, *check.split()], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
