"""CPU time by part of a program, for functions that call each other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


class Clock:
    """CPU milliseconds by part; a part's time excludes that of parts inside it."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for a part."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = (time.process_time() - start) * 1e3
                self.parts[part] += spent - self._inside.pop()
                self._inside[-1] += spent

        return wrapper

    @contextmanager
    def around(self, places: dict[tuple[Any, str], str]) -> Iterator[None]:
        """Time functions of modules or classes, ``{(owner, name): part}``, while inside."""
        with ExitStack() as stack:
            for (owner, name), part in places.items():
                stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield
