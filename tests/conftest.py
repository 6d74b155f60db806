"""Fixtures for whole trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty outputs directory, and the commands that write to it."""
    return Lab(tmp_path)
