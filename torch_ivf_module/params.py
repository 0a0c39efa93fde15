"""Per-call search settings."""

from __future__ import annotations

from dataclasses import dataclass

PROFILES = ("exact", "speed")


@dataclass(frozen=True)
class SearchParams:
    """Settings of one search; a field left None means the index's own value.

    Parameters
    ----------
    profile : "speed" (default) ranks by a rounded score, allows for its error and scores the best exactly; "exact"
        scores every vector of the probed lists exactly, which takes several times as long.
    nprobe : lists to visit, >= 1.
    max_codes : the most rows to read: whole lists, nearest first, until the next would pass it; the nearest is
        always read.

    Raises ValueError for a value out of range.

    >>> SearchParams(nprobe=4)
    SearchParams(profile='speed', nprobe=4, max_codes=None)
    """

    profile: str = "speed"
    nprobe: int | None = None
    max_codes: int | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))}, got {self.profile!r}")
        for name in ("nprobe", "max_codes"):
            value = getattr(self, name)
            if value is not None:
                positive(value, name)


def positive(value: int, name: str) -> int:
    """`value` as an int of at least 1, or TypeError / ValueError naming the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)
