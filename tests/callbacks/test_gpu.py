"""The fits of the other tests once more on a GPU: the same functions, collected here with another accelerator.

Without a GPU they are skipped, aloud. `TEST_ACCELERATOR=cpu` runs them on the CPU, to see that this file is right.
"""

import os

import pytest
import torch

import toy

ACCELERATOR = os.environ.get("TEST_ACCELERATOR", "gpu")
if ACCELERATOR == "gpu" and not torch.cuda.is_available():
    pytest.skip("no GPU here: the fits of this folder's tests did not run on one", allow_module_level=True)

from test_activations_in_fit import *  # noqa: E402, F403
from test_attention_in_fit import *  # noqa: E402, F403
from test_averaging import *  # noqa: E402, F403
from test_compiled import *  # noqa: E402, F403
from test_fit import *  # noqa: E402, F403
from test_loaders import *  # noqa: E402, F403
from test_logs import *  # noqa: E402, F403
from test_monitor import *  # noqa: E402, F403
from test_optimizers import *  # noqa: E402, F403
from test_resume import *  # noqa: E402, F403
from test_safety import *  # noqa: E402, F403
from test_scenarios import *  # noqa: E402, F403
from test_training import *  # noqa: E402, F403
from test_unusual_steps import *  # noqa: E402, F403


@pytest.fixture(scope="module", autouse=True)
def _on_the_gpu():
    """Before the fixtures of a module, too: they make the runs that others resume."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "ACCELERATOR", ACCELERATOR)
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # else no fit resumes bit for bit
        yield
        torch.use_deterministic_algorithms(before)
