"""Result files that grow row by row: a run that is killed goes on where it stopped, and several may share the work."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from _report import RESULTS, write


class Rows:
    """Rows of one benchmark, each known by some of its entries; the file is read before and written after every one.

    :param settings: of the whole run; rows of an earlier run with other settings are dropped
    :param keys: entries that tell rows apart
    :param keep: False for a smoke test, which neither reads nor writes
    :param packages: whose versions are in the file too
    :param show: prints a new row
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        keys: Iterable[str],
        keep: bool,
        packages: Iterable[str] = (),
        show: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.name, self.settings, self.keys, self.keep = name, settings, tuple(keys), keep
        self.packages, self.show = tuple(packages), show or partial(print, flush=True)
        self._held: list[dict[str, Any]] = []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of other processes too."""
        path = RESULTS / f"{self.name}.json"
        if self.keep and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["settings"] == json.loads(json.dumps(self.settings)):
                return before["rows"]
        return self._held

    def make(self, run: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Add the row ``key | run()``, unless it is there."""
        with _alone():
            if self._found(key):
                return
        row = key | run()
        self.show(row)
        with _alone():
            if not self._found(key):
                self._held = [*self.rows, row]
                if self.keep:
                    payload = {"settings": self.settings, "rows": self._held}
                    seeds = sorted({row["seed"] for row in self._held})
                    write(self.name, payload, seeds=seeds, packages=self.packages)

    def _found(self, key: dict[str, Any]) -> bool:
        return any(all(row[name] == key[name] for name in self.keys) for row in self.rows)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time inside."""
    with Path(__file__).open(encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
