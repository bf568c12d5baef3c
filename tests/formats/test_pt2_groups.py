"""Groups of input channels in the pt2 file: torch alone puts them together, bit for bit."""

import json
import zipfile

import pytest
import torch

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import pt2_archive
from lightning_xai_compress.formats.pt2 import check_pt2, read_pt2, write_pt2
from lightning_xai_compress.formats.registry import Inputs

from grouped_nets import NETWORKS, mlp, on_groups
from pt2_nets import EXTRA, forge, swap


def index(path):
    with zipfile.ZipFile(path) as source:
        return json.loads(source.read(f"archive/{EXTRA}"))


@pytest.mark.parametrize("network", ["channels_last", "tokens", "transposed", "float16"])
def test_weights_and_outputs_are_the_models_own(tmp_path, network):
    build, tensors = NETWORKS[network]
    model = build()
    plan = on_groups(model, sparsity=0.0 if network == "tokens" else 0.5)
    path = tmp_path / "model.pt2"
    write_pt2(model, plan, path, [Inputs(tensors)])

    assert check_pt2(path, model, [Inputs(tensors)]) == 0.0

    program = torch.export.load(str(path)).module()
    frozen = model.eval().requires_grad_(False)
    for batch in (1, 4):
        args = [tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1)) for tensor in tensors]
        torch.testing.assert_close(program(*args), frozen(*args), rtol=0, atol=0)
    stored = {entry.name: entry for entry in read_pt2(path).tensors}
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].values, tensor), name
    for name, bits in plan.allocation.bits.items():
        assert stored[name].bits == {width: bits.tolist().count(width) for width in set(bits.tolist())}
    assert index(path)["version"] == 2


def test_one_row_a_channel_is_version_1(tmp_path):
    model = mlp()
    write_pt2(model, on_groups(model, groups=(1,)), tmp_path / "m.pt2", [Inputs((torch.randn(2, 12),))])

    assert index(tmp_path / "m.pt2")["version"] == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = mlp()  # 0.weight: 9 channels of 12 inputs in 4 groups of one width
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    write_pt2(model, on_groups(model, widths=(4,)), path, [Inputs((torch.randn(2, 12),))])
    return path.read_bytes()


FORGERIES = {
    "more rows": b'"groups":[[4,37]]',
    "rows that do not divide the inputs": b'"groups":[[4,45]]',
    "more groups than inputs": b'"groups":[[4,216]]',
    "fewer rows than channels": b'"groups":[[4,3]]',
    "no rows": b'"groups":[[4,0]]',
    "negative rows": b'"groups":[[4,-36]]',
    "rows that are not there": b'"groups":[[4,18]]',
    "rows taken back": b'"groups":[[4,54],[8,-18]]',
    "huge": b'"groups":[[4,9000000000000000000000]]',
    "no list": b'"groups":[[4]]',
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_rows_are_refused(tmp_path, written, forgery):
    forge(written, tmp_path / "m.pt2", {EXTRA: swap(b'"groups":[[4,36]]', FORGERIES[forgery])})

    with pytest.raises(ArtifactError, match="is damaged: expected an index that fits its tensors"):
        read_pt2(tmp_path / "m.pt2")


def test_a_shape_of_no_channels_is_refused(tmp_path, written):
    forge(written, tmp_path / "m.pt2", {EXTRA: swap(b'"shape":[9,12]', b'"shape":[0,12]')})

    with pytest.raises(ArtifactError, match="is damaged: expected an index that fits its tensors"):
        read_pt2(tmp_path / "m.pt2")


def test_groups_in_an_index_of_version_1_are_refused(tmp_path, written):
    forge(written, tmp_path / "m.pt2", {EXTRA: swap(b'"version":2', b'"version":1')})

    with pytest.raises(ArtifactError, match=r"damaged: .*9 rows, but groups of \[36\]"):
        read_pt2(tmp_path / "m.pt2")


def test_a_reader_of_version_1_alone_refuses_groups_by_the_version(tmp_path, written, monkeypatch):
    (tmp_path / "m.pt2").write_bytes(written)
    assert len(read_pt2(tmp_path / "m.pt2").tensors) == 4
    monkeypatch.setattr(pt2_archive, "_VERSIONS", (1,))

    with pytest.raises(ArtifactError, match="has version 2 of the index, expected one of"):
        read_pt2(tmp_path / "m.pt2")
