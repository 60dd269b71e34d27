"""JSON files in the user's cache folder, which several processes may add to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

_LOG = logging.getLogger(__name__)
_VERSION = 1

Entry = TypeVar("Entry")


def cache_file(name: str) -> Path:
    """Where a file is kept: under CHANOPT_CACHE_DIR, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("CHANOPT_CACHE_DIR") or Path(home) / "chanopt") / name


def read(path: Path | None, key: str, parse: Callable[[Any], Entry]) -> dict[str, Entry]:
    """The entries of a file; none if it is not there, from another version, or damaged (it is then written anew).

    Args:
        path: the file; None is one that is not there.
        key: under which the file has its entries.
        parse: from JSON to an entry; may raise whatever a lookup or a conversion raises.
    """
    if path is None or not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != _VERSION:
            return {}
        return {name: parse(entry) for name, entry in data[key].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is damaged (%s: %s); its %s are measured again", path, type(error).__name__, error, key)
        return {}


def add(path: Path | None, key: str, parse: Callable[[Any], Any], entries: Mapping[str, Any]) -> None:
    """Add entries, as JSON values, to what a file has by now; what cannot be parsed goes."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)

    def kept(entry: Any) -> Any:
        parse(entry)
        return entry

    every = {**read(path, key, kept), **entries}
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"version": _VERSION, key: dict(sorted(every.items()))}, indent=1) + "\n", "utf-8")
    draft.replace(path)
