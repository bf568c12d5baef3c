import math

import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.packed import load_compressed, pack, write_packed
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from packed_nets import Net, compressed, quantize


def test_weights_off_their_grid_are_refused_by_name():
    model, plan = compressed()
    with torch.no_grad():
        model.head.weight[7, 3] = 0.123
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(ArtifactError, match=r"head\.weight does not lie on its grid: 1 of \d+ .*in channel 7 "):
        pack(model, plan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model, plan = compressed()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = value
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(ArtifactError, match=r"conv\.weight does not lie on its grid: 1 of 648 "):
        pack(model, plan)


def test_codes_beyond_their_bit_width_are_refused():
    model, plan = compressed()
    scale = plan.scales["head.weight"][0]  # of 2 bits: codes in -1..1
    with torch.no_grad():
        model.head.weight[0, 0] = 2 * scale
    plan = CompressionPlan(Mask({}), plan.allocation, plan.scales)

    with pytest.raises(
        ArtifactError, match=r"head\.weight does not lie on its grid: 1 of 240 .*in channel 0 .* 2 bits"
    ):
        pack(model, plan)


def test_weights_that_should_be_pruned_are_refused():
    model, plan = compressed()
    row, column = (~plan.mask["head.weight"]).nonzero()[0]
    with torch.no_grad():
        model.head.weight[row, column] = plan.scales["head.weight"][row]

    with pytest.raises(ArtifactError, match=r"head\.weight: expected zeros where the mask prunes, got 1 other"):
        pack(model, plan)


@pytest.mark.parametrize("scale", [0.1, -0.5, math.inf, math.nan])
def test_scales_that_bfloat16_cannot_hold_are_refused(scale):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    allocation = BitAllocation({"weight": torch.tensor([4], dtype=torch.uint8)}, {"weight": 2})

    with pytest.raises(ArtifactError, match="weight: expected scales >= 0 that bfloat16 holds exactly"):
        pack(model, CompressionPlan(Mask({}), allocation, {"weight": torch.tensor([scale])}))


def test_plans_of_another_model_are_refused():
    plan = compressed()[1]

    with pytest.raises(ArtifactError, match=r"the plan names what \w+ lacks: conv\.weight, head\.weight"):
        pack(nn.Linear(3, 3), plan)
    with pytest.raises(ArtifactError, match=r"head\.weight: expected a mask of shape \(12, 24\), got \(10, 24\)"):
        pack(Net(classes=12), CompressionPlan(Mask({"head.weight": plan.mask["head.weight"]})))
    with pytest.raises(
        ArtifactError, match=r"head\.weight has 12 output channels, but \(10,\) scales and \(10,\) bit widths"
    ):
        pack(Net(classes=12), CompressionPlan(Mask({}), *_only(plan, "head.weight")))


def _only(plan, name):
    allocation = BitAllocation({name: plan.allocation[name]}, {name: plan.allocation.channel_size[name]})
    return allocation, {name: plan.scales[name]}


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"_extra_state: expected a tensor in the state dict, got dict"):
        pack(Extra(2, 2), CompressionPlan(Mask({})))
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    with pytest.raises(ArtifactError, match="no tensors with memory of their own: _extra_state"):
        load_compressed(tmp_path / "m", Extra(2, 2))


def test_tensors_without_values_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"weight: expected a dense tensor with values, got torch\.float32"):
        pack(nn.Linear(2, 2, device="meta"), CompressionPlan(Mask({})))
    with pytest.raises(ArtifactError, match="weight: expected a dense tensor with values"):
        pack(nn.LazyLinear(2), CompressionPlan(Mask({})))
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    with pytest.raises(ArtifactError, match="no tensors with memory of their own: weight, bias; build it on a real"):
        load_compressed(tmp_path / "m", nn.Linear(2, 2, device="meta"))


def test_another_model_is_refused_with_all_that_differs_and_untouched(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))
    other = Net(classes=12)
    del other.embed
    other.norm.double()
    other.gain = nn.Parameter(torch.zeros(2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    with pytest.raises(ArtifactError) as raised:
        load_compressed(tmp_path / "m", other)

    text = str(raised.value)
    assert "missing in the file: gain" in text
    assert "unexpected in the file: embed.weight" in text
    assert "head.weight (model (12, 24), file (10, 24))" in text
    assert "norm.weight (model torch.float64, file torch.float32)" in text
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_expanded_buffers_are_refused_before_anything_is_written(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("shift", torch.zeros(3))
    (tmp_path / "m").write_bytes(pack(model, CompressionPlan(Mask({}))))
    model.shift = torch.zeros(1).expand(3)

    with pytest.raises(ArtifactError, match=r"no tensors with memory of their own: shift; .*clone expanded buffers"):
        load_compressed(tmp_path / "m", model)


class Refusing(nn.Linear):
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        errors.append("not today")


def test_a_model_that_refuses_in_its_own_hooks_stays_as_it_was(tmp_path):
    (tmp_path / "m").write_bytes(pack(nn.Linear(2, 2), CompressionPlan(Mask({}))))
    model = Refusing(2, 2)
    before = model.weight.clone()

    with pytest.raises(ArtifactError, match=r"(?s)refuses it in its own loading hooks: .*not today"):
        load_compressed(tmp_path / "m", model)
    assert torch.equal(model.weight, before)


def test_a_file_of_untied_weights_does_not_fill_a_tied_model(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    (tmp_path / "m").write_bytes(pack(model, quantize(model, ["0.weight"])))
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.clone()

    with pytest.raises(ArtifactError, match=r"different values for 0\.weight, 1\.weight, which share one tensor"):
        load_compressed(tmp_path / "m", tied)
    assert torch.equal(tied[0].weight, before)


@pytest.mark.parametrize("name", ["a/b", "a\\x", "/etc", "a\0", "a\n", "x" * 1025])
def test_names_like_paths_are_refused_before_anything_is_written(tmp_path, name):
    model = nn.ModuleDict({name: nn.Linear(2, 2)})

    with pytest.raises(ArtifactError, match=r"expected names of at most 1024 characters, .* rename that module"):
        write_packed(model, CompressionPlan(Mask({})), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_of_nearly_nothing_but_zeros_is_refused_rather_than_written_unreadably():
    model = nn.utils.skip_init(nn.Linear, 1 << 12, 5 << 10, bias=False)
    nn.init.zeros_(model.weight)
    plan = CompressionPlan(Mask({"weight": torch.zeros(5 << 10, 1 << 12, dtype=torch.bool)}))

    with pytest.raises(ArtifactError, match="the model declares 83886080 bytes of tensors: expected at most 67108864"):
        pack(model, plan)


def test_an_index_that_no_reader_would_take_is_not_written():
    plan = CompressionPlan(Mask({}), provenance={"note": "x" * (1 << 21)})

    with pytest.raises(ArtifactError, match="expected an index of at most 1048576 bytes, got 2097"):
        pack(nn.Linear(2, 2), plan)
