"""What the tests of the evaluation share."""

import pytest

from scale.evaluate import report


@pytest.fixture
def without_pictures(monkeypatch):
    """Reports as on a machine without matplotlib: figures cost 4 s, and tables need none."""
    monkeypatch.setattr(report, "draw", lambda subject: [])
    monkeypatch.setattr(report, "draw_summary", lambda subject: None)
