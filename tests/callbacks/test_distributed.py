"""Two processes decide alike."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from toy import Corners, compression, fit

if __name__ == "__main__":
    folder = sys.argv[1]
    callback = compression(folder, metric="val_acc")
    model, run = fit(folder, [callback], strategy="ddp", devices=2, max_epochs=6)
    plan = callback.session.latent.plan()
    torch.save(
        {"weights": model.state_dict(), "keep": dict(plan.mask.keep), "bits": dict(plan.allocation.bits)},
        f"{folder}/rank{run.global_rank}.pt",
    )
"""


@pytest.mark.slow
def test_both_ranks_of_ddp_end_with_the_same_weights_masks_and_bits(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)

    result = subprocess.run(
        [sys.executable, script, tmp_path],
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("weights", "keep", "bits"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), (part, name)
    assert result.stdout.count("report:") == 1
    assert result.stdout.count("estimated size") == 1
    assert (tmp_path / "model.safetensors").exists()
