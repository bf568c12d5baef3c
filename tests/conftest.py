"""Shared by all tests: quiet Lightning, one thread's arithmetic."""

import logging
import warnings

import pytest
import torch


def pytest_collection_modifyitems(items):
    """What runs for minutes comes first, so that processes side by side end at about the same time."""
    items.sort(key=lambda item: item.path.name not in ("test_examples.py", "test_benchmarks.py"))


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*log_every_n_steps.*|.*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        yield
