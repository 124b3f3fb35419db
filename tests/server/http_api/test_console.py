"""The page and its files: types, headers, caching, and that nothing comes from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from adaplex_server.http_api.console.page import FOLDER

ASSETS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css"))


def test_the_page_needs_nothing_from_elsewhere(http: Any) -> None:
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(r'(?:src|href)="([^"#]+)"', page.text) == ["console/style.css", "console/app.js"]
    for name in ASSETS:
        asset = http.get(f"/console/{name}")
        kind = "text/javascript" if name.endswith(".js") else "text/css"
        assert asset.headers["content-type"] == f"{kind}; charset=utf-8"
        assert asset.headers["x-content-type-options"] == "nosniff"
        assert "://" not in asset.text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in asset.text and "eval(" not in asset.text


def test_modules_import_what_there_is() -> None:
    for name in ASSETS:
        text = (FOLDER / name).read_text()
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(ASSETS), name
        assert len(text.splitlines()) < 200


def test_a_browser_keeps_what_has_not_changed(http: Any) -> None:
    first = http.get("/console/app.js")
    again = http.get("/console/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert http.head("/").status_code == 200
    assert http.get("/console/page.py").status_code == http.get("/console/..%2fapp.py").status_code == 404
