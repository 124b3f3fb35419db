"""What `--base` may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.bases import embedded, locate


def test_nothing_means_the_embedded_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "ensure_embedded", lambda progress: tmp_path)
    assert locate.locate_base(None) == locate.LocatedBase(tmp_path, "smollm2-135m-instruct")


def test_a_folder_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My-Base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert locate.locate_base(str(folder)) == locate.LocatedBase(folder, "My-Base")
    monkeypatch.chdir(folder)
    assert locate.locate_base(".") == locate.LocatedBase(folder, "My-Base")


@pytest.mark.parametrize("arg", ["nowhere", "/no/such/folder", "a b/c", "../x/y", ""])
def test_what_is_neither_folder_nor_hub_name_is_refused(
    arg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match=r"neither a folder|no config\.json"):
        locate.locate_base(arg)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(StartupError, match="neither a folder"):
        locate.locate_base(str(tmp_path / "model.gguf"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cached snapshot of owner/Name, and a network that is never there."""
    from huggingface_hub import constants, file_download

    def no_network(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    repo = tmp_path / "models--owner--Name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "get_hf_file_metadata", no_network)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_the_hubs_cache_needs_no_network(hub: Path) -> None:
    (hub / "config.json").touch()
    (hub / "model.safetensors").touch()
    assert locate.locate_base("owner/Name") == locate.LocatedBase(hub, "Name")


@pytest.mark.parametrize("shards", [["model-1.safetensors"], ["model-1.safetensors", "model-2.safetensors"], None])
def test_a_broken_off_download_is_not_taken_for_whole(hub: Path, shards: list[str] | None) -> None:
    (hub / "config.json").touch()
    (hub / "model-1.safetensors").touch()
    index = "{" if shards is None else json.dumps({"weight_map": {str(n): file for n, file in enumerate(shards)}})
    (hub / "model.safetensors.index.json").write_text(index)
    if shards == ["model-1.safetensors"]:
        assert locate.locate_base("owner/Name").folder == hub
    else:
        assert not locate._complete(hub)


def test_offline_and_not_cached_says_what_to_do(hub: Path) -> None:
    with pytest.raises(StartupError, match=r"could not be fetched.*name a local folder"):
        locate.locate_base("owner/Other")
