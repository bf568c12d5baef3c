import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import packed
from lightning_xai_compress.formats.packed import load_compressed, pack, packed_size, read_packed
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from packed_nets import compressed, quantize, reseal

VERSIONS = {"lightning-xai-compress": "9.9", "torch": "8.8"}


def with_provenance(plan, provenance):
    return CompressionPlan(plan.mask, plan.allocation, plan.scales, plan.skipped, provenance)


def test_every_key_is_told_with_its_values_and_shared_tensors_take_their_bytes_once(tmp_path):
    model, plan = compressed()
    model.again = model.norm
    (tmp_path / "m").write_bytes(pack(model, plan))

    contents = read_packed(tmp_path / "m")

    state = model.state_dict()
    assert [tensor.name for tensor in contents.tensors] == list(state)
    assert not any(tensor.bytes for tensor in contents.tensors if tensor.name.startswith("again."))
    size = packed_size(model, plan)
    assert sum(tensor.bytes for tensor in contents.tensors) == size.total - size.metadata
    for tensor in contents.tensors:
        assert tensor.values.dtype == state[tensor.name].dtype
        assert torch.equal(tensor.values, state[tensor.name])


def test_widths_are_counted_by_channels(tmp_path):
    model, plan = compressed()
    keep = torch.rand(11, 5) < 0.3
    with torch.no_grad():
        model.embed.weight.mul_(keep)
    plan = CompressionPlan(Mask({**plan.mask.keep, "embed.weight": keep}), plan.allocation, plan.scales)
    (tmp_path / "m").write_bytes(pack(model, plan))

    bits = {tensor.name: dict(tensor.bits) for tensor in read_packed(tmp_path / "m").tensors}

    assert bits["conv.weight"] == {2: 4, 3: 4, 4: 4, 5: 3, 6: 3, 7: 3, 8: 3}
    assert bits["head.weight"] == {2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}
    assert bits["embed.weight"] == bits["norm.bias"] == {}


@pytest.mark.parametrize("classes", [10, 700])
def test_the_bytes_of_all_tensors_and_the_metadata_are_the_file(tmp_path, classes):
    model, plan = compressed(classes=classes)
    data = pack(model, plan)
    (tmp_path / "m").write_bytes(data)

    tensors = {tensor.name: tensor.bytes for tensor in read_packed(tmp_path / "m").tensors}

    size = packed_size(model, plan)
    assert sum(tensors.values()) + size.metadata == len(data)
    assert all(place >= 0 for place in tensors.values())
    for name, place in size.layers.items():
        assert tensors[name] == pytest.approx(place, rel=0.02, abs=3)
    assert tensors["head.bias"] <= 4 * classes


def test_a_tensor_alone_in_its_chunk_is_told_exactly(tmp_path):
    model = nn.Module()
    model.register_buffer("floats", torch.randn(500))
    model.register_buffer("bytes", torch.randint(0, 256, (300,)).to(torch.uint8))
    (tmp_path / "m").write_bytes(pack(model, CompressionPlan(Mask({}))))

    tensors = {tensor.name: tensor.bytes for tensor in read_packed(tmp_path / "m").tensors}

    assert tensors["bytes"] == 300
    assert 3 * 500 < tensors["floats"] == packed_size(model, CompressionPlan(Mask({}))).rest - 300


@pytest.mark.parametrize("zero", [True, False])
def test_models_of_nothing_are_told(tmp_path, zero):
    model = nn.Linear(30, 20, bias=False) if zero else nn.ReLU()
    plan = quantize(model, ["weight"]) if zero else CompressionPlan(Mask({}))
    if zero:
        nn.init.zeros_(model.weight)
        size = {"weight": 30}
        bits = {"weight": torch.full((20,), 4, dtype=torch.uint8)}
        plan = CompressionPlan(Mask({}), BitAllocation(bits, size), {"weight": torch.zeros(20)})
    (tmp_path / "m").write_bytes(pack(model, plan))

    tensors = read_packed(tmp_path / "m").tensors

    assert sum(tensor.bytes for tensor in tensors) == len(pack(model, plan)) - packed_size(model, plan).metadata
    assert len(tensors) == zero


def test_provenance_and_versions_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_versions", lambda: VERSIONS)
    model, plan = compressed()
    plan = with_provenance(plan, {"torch": "1.2", "criterion": "lrp", "note": "größe\n"})
    (tmp_path / "m").write_bytes(pack(model, plan))

    assert read_packed(tmp_path / "m").provenance == {
        "criterion": "lrp",
        "note": "größe\n",
        "torch": "1.2",
        "written by lightning-xai-compress": "9.9",
        "written by torch": "8.8",
    }


def test_versions_are_those_of_the_libraries(tmp_path):
    (tmp_path / "m").write_bytes(pack(*compressed()))

    provenance = read_packed(tmp_path / "m").provenance

    assert torch.__version__.startswith(provenance["written by torch"].split("+")[0])
    assert provenance.keys() == {"written by lightning-xai-compress", "written by torch"}


def test_only_model_plan_provenance_and_versions_make_the_bytes(monkeypatch):
    model, plan = compressed()
    one = pack(model, with_provenance(plan, {"a": "1", "b": "2"}))

    assert pack(model, with_provenance(plan, {"b": "2", "a": "1"})) == one
    assert pack(model, with_provenance(plan, {"a": "1", "b": "3"})) != one
    monkeypatch.setattr(packed, "_versions", lambda: VERSIONS)
    assert pack(model, with_provenance(plan, {"a": "1", "b": "2"})) != one


@pytest.mark.parametrize("key", ["provenance", "versions"])
@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, {"a": {"b": "c"}}, None])
def test_loading_ignores_where_a_file_comes_from_and_reading_refuses_nonsense(tmp_path, key, value):
    data = reseal(pack(*compressed()), lambda index: index.__setitem__(key, value))
    (tmp_path / "m").write_bytes(data)

    assert "conv.weight" in load_compressed(tmp_path / "m")
    with pytest.raises(ArtifactError, match="is damaged: expected texts that say where it comes from, got"):
        read_packed(tmp_path / "m")


def test_unknown_keys_and_missing_provenance_are_ignored(tmp_path):
    def change(index):
        del index["provenance"], index["versions"]
        index["more"] = 1

    (tmp_path / "m").write_bytes(reseal(pack(*compressed()), change))

    assert read_packed(tmp_path / "m").provenance == {}


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "m").write_bytes(pack(*compressed())[:-1])

    with pytest.raises(ArtifactError, match="damaged or cut short"):
        read_packed(tmp_path / "m")
