"""Fixtures that every test file shares."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded inputs and outputs of the published model."""
    if not GOLDEN.is_dir():
        pytest.skip("no ../shared/golden beside the clone: nothing recorded to compare with")
    return GOLDEN


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
