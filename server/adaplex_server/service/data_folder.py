"""Opens what a server has on its disk, and follows paths that clients send no further than they may go."""

from __future__ import annotations

import logging
from pathlib import Path

from adaplex_adapters.base_shape import BaseShape
from adaplex_adapters.catalogue import Catalogue
from adaplex_adapters.errors import InvalidRequest, NotFound, StartupError, StorageFailed
from adaplex_adapters.reader import ReadLimits
from adaplex_adapters.store import AdapterStore
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape
from adaplex_server.service.settings import ServiceSettings

log = logging.getLogger(__name__)


def open_data(settings: ServiceSettings, limits: ReadLimits) -> tuple[AdapterStore, Catalogue, BaseShape]:
    """Store and catalogue of the data folder, cleared of what a crash left, and the base's shape.

    Raises StartupError.
    """
    engine = settings.engine
    shape = base_shape(read_config(Path(engine.base), engine.base_name))
    path = settings.data_dir / "catalogue.sqlite3"
    _check_not_lost(path, Path(engine.store))
    # The catalogue first: its lock keeps a second server from touching the store.
    catalogue = Catalogue(path)
    try:
        store = AdapterStore(Path(engine.store), limits)
        for revision in store.prune({entry.spec.revision for entry in catalogue.entries()}):
            log.info("removed adapter content %s, which no name uses", revision[:12])
    except StorageFailed as error:
        catalogue.close()
        raise StartupError(error.message) from error
    return store, catalogue, shape


def _check_not_lost(catalogue: Path, store: Path) -> None:
    """Raise StartupError if there are adapters but no catalogue: a new, empty one would have them all pruned."""
    revisions = store / "revisions"
    try:
        stored = 0 if catalogue.exists() or not revisions.is_dir() else sum(1 for _ in revisions.iterdir())
    except OSError as error:
        raise StartupError(f"The adapter store cannot be read ({error.strerror}).") from error
    if stored:
        raise StartupError(
            f"The catalogue {catalogue.name} is gone, but the store '{store.name}' beside it holds {stored} adapters. "
            f"Nothing was changed: restore {catalogue.name} from a backup, or move '{store.name}' away and load the "
            "adapters again."
        )


def inside(root: Path | None, path: str) -> Path:
    """The folder that a client's path means, below the configured one. Raises InvalidRequest, NotFound."""
    if root is None:
        raise InvalidRequest("this server has no adapter folder (--adapters); upload the files instead", param="path")
    try:
        root = root.resolve()
        found = (root / path).resolve()
        is_folder = found.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequest("the path is not one that can be opened", param="path") from error
    if root not in found.parents:
        raise InvalidRequest("the path is not inside the server's adapter folder", param="path")
    if not is_folder:
        raise NotFound("there is no such folder in the server's adapter folder", param="path")
    return found
