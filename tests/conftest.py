"""Shared by all tests: quiet Lightning, one thread's arithmetic."""

import logging
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*log_every_n_steps.*|.*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        yield
