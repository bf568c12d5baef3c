"""A fit that ends in files with merged BatchNorm: the module keeps its own."""

import json

import pytest
import torch
from torch import nn

from lightning_xai_compress import Files, load_compressed

from toy import Corners, ToyNet, compression, fit


class Normed(ToyNet):
    """One layer that can be merged, one that cannot."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4, affine=False))


@pytest.mark.parametrize(("export", "float16"), [("last", False), ("best", True)])
def test_files_hold_merged_norms_and_the_module_its_own(tmp_path, export, float16):
    models, reports = [], []
    settings = {"metric": "val_acc", "export": "best", "mode": "max"} if export == "best" else {}
    for merge in (False, True):
        folder = tmp_path / str(merge)
        files = Files(float16=float16, merge_batchnorm=merge)
        model, _ = fit(folder, [compression(folder, files=files, **settings)], Normed)
        models.append(model.eval())
        reports.append(json.loads((folder / "report.json").read_text()))

    plain, merged = (model.state_dict() for model in models)
    for name, tensor in plain.items():
        norm = name in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
        own = merged[name].half().float() if norm and float16 else merged[name]
        assert torch.equal(tensor, own), name
    assert bool((merged["norm.running_var"] != 1).all())

    x = Corners().data.tensors[0]
    held = [load_compressed(tmp_path / str(merge) / "model.safetensors", Normed()).eval() for merge in (False, True)]
    assert not held[1].norm.running_mean.any()
    assert bool((held[1].norm.running_var == 1).all())
    with torch.no_grad():
        expected, found = (model(x) for model in held)
        assert float((found - expected).abs().max()) <= (5e-3 if float16 else 1e-5) * float(expected.abs().max())
        if export == "last":
            own = models[1](x)
            assert float((found - own).abs().max()) <= 1e-5 * float(own.abs().max())

    assert reports[1]["compressed"]["accuracy"] == reports[0]["compressed"]["accuracy"]
    skipped = {each["name"]: each["reason"] for each in reports[1]["skipped"]}
    assert "it has no weight and bias (affine=False): BatchNorm is not merged" in skipped["head.1"]
    assert "head.1" not in {each["name"] for each in reports[0]["skipped"]}
    assert reports[1]["artifacts"][0]["max_abs_diff"] == 0
