"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Captures, labelled flows and tools that live beside the checkout and are not ours to copy."""
    path = Path(os.environ.get("FLOWSAGE_SHARED", ROOT.parent / "shared"))
    if not (path / "pcaps" / "MANIFEST.csv").exists():
        pytest.skip(f"no captures and labelled flows at {path} (set FLOWSAGE_SHARED)")
    return path
