"""Checks that settings share; each message names the full key."""

from typing import Any


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Raise ``ValueError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def as_list(name: str, value: Any) -> list[str]:
    """Accept one text where a list of texts is expected."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} ({value!r}) must be a text or a list of texts")
    return items


def require_fraction(name: str, value: float) -> None:
    """Refuse a setting outside 0 to 1."""
    require(0.0 <= value <= 1.0, f"{name} ({value}) must be between 0 and 1")


def require_positive(name: str, value: float) -> None:
    """Refuse a setting that is not above 0."""
    require(value > 0, f"{name} ({value}) must be above 0")
