"""``Progress``: the bar of a run, which says what is being done, and where the time of the run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import tqdm

STEPS = "steps"

_LEAST_SECONDS = 0.1  # between two changes of the bar's text once steps are taken: looks may follow each other closely


class Progress:
    """A bar over the steps of a run, and the seconds of each activity, which add up to the whole time.

    :param num_steps: steps in all.
    :param shown: whether there is a bar.
    :ivar bar: the bar; the run moves it.
    :ivar seconds: of each activity until the last change; what is none of them is :data:`STEPS`.
    """

    def __init__(self, num_steps: int, shown: bool) -> None:
        self.seconds: dict[str, float] = {}
        self.bar: Any = tqdm.tqdm(total=num_steps, disable=not shown)
        self._first, self._activities, self._said = 0, [STEPS], 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Time what is done inside as ``activity``, what it does as something else excepted, and show its name."""
        self._change([*self._activities, activity])
        try:
            yield
        finally:
            self._change(self._activities[:-1])
            if self.bar.n == self._first:
                self.bar.unpause()  # the rate is that of steps

    def _change(self, activities: list[str]) -> None:
        now = time.perf_counter()
        last = self._activities[-1]
        self.seconds[last] = self.seconds.get(last, 0.0) + now - self._since
        self._since, self._activities = now, activities
        if not self.bar.disable:
            name = activities[-1] if activities[1:] else ""
            shows = self.bar.n == self._first or now - self._said > _LEAST_SECONDS
            self._said = now if shows else self._said
            self.bar.set_description(name or None, refresh=shows)

    @property
    def total(self) -> float:
        """Seconds until now."""
        return sum(self.seconds.values()) + time.perf_counter() - self._since

    def split(self) -> dict[str, float]:
        """Seconds of each activity until now, those of the steps last."""
        self._change(self._activities)
        return {name: s for name, s in self.seconds.items() if name != STEPS} | {STEPS: self.seconds[STEPS]}

    def go_on(self, step: int, seconds: dict[str, float]) -> None:
        """Begin where an earlier run ended, after ``step`` steps."""
        self._first = step
        self.bar.initial = self.bar.n = step
        for name, s in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + s
