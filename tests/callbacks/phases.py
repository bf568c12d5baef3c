"""What a report tells of the phases of a fit."""

import torch

from lightning_xai_compress import load_compressed


def events(callback):
    """Pairs (event, epoch), of which repeated prunings are left out but for the first."""
    found = {}
    for event in callback.report.history:
        found.setdefault(event["event"], event["epoch"])
    return found


def went_through(callback, model, folder):
    """Pruned, then trained in full, then quantized, then exported exactly."""
    report = callback.report
    kinds = [event["event"] for event in report.history if event["event"] != "scored"]
    assert report.halted == ""
    assert report.sparsity == 0.5
    assert 2.8 < report.average_bits <= 3.0
    assert kinds == ["pruned"] * (len(kinds) - 1) + ["quantized"]
    reloaded = load_compressed(folder / "model.safetensors", type(model)())
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
