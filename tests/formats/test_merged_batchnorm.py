"""BatchNorm merged into one scale and one shift a channel: the same outputs, and a smaller file."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_xai_compress.budget import weigh
from lightning_xai_compress.formats import FORMATS, Files, finished, load_compressed, packed_size, save
from lightning_xai_compress.formats.finishing import round_module
from lightning_xai_compress.formats.merging import merge_batchnorm, merged_names
from lightning_xai_compress.formats.registry import Inputs
from lightning_xai_compress.plan import CompressionPlan, Mask

from onnx_nets import operators, quantize
from traced_nets import cnn

VECTORS = ("weight", "bias", "running_mean", "running_var")
PLAN = CompressionPlan(Mask({}))


def trained(model, seed=0):
    """Statistics and affine values as training might leave them, some weights negative and some zero."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            if norm.running_mean is not None:
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.01, 4, generator=generator)
                norm.num_batches_tracked.fill_(37)
            if norm.weight is not None:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
                with torch.no_grad():
                    norm.weight[0] = 0.0
    return model.eval()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bytes_of(state):
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in state.items()}


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def agree(model, x, *, rtol=1e-5):
    """Merge, and compare outputs with those before: to a part of the largest."""
    before = outputs(model, x)
    skipped = merge_batchnorm(model)
    after = outputs(model, x)
    assert after.dtype == before.dtype
    assert float((after - before).abs().max()) <= rtol * float(before.abs().max())
    return skipped


def norm_of(channels=8, **settings):
    return trained(nn.BatchNorm2d(channels, **settings))


def inputs(channels=8, dtype=torch.float32):
    return torch.randn(4, channels, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_the_merged_layer_is_the_formula_worked_by_hand():
    norm = nn.BatchNorm1d(2, eps=0.25)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([6.0, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 2.0]))
        norm.running_mean.copy_(torch.tensor([3.0, -4.0]))
        norm.running_var.copy_(torch.tensor([3.75, 15.75]))  # roots of var + eps: 2 and 4

    assert merge_batchnorm(norm) == []

    one = math.sqrt(1.25)
    torch.testing.assert_close(norm.weight.detach(), torch.tensor([3.0 * one, -0.25 * one]), rtol=1e-7, atol=0)
    assert norm.bias.tolist() == [-8.0, 1.0]  # 1 - 3 * 3 and 2 - 4 / 4
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert norm.running_var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "settings", [{}, {"eps": 1e-3}, {"eps": 0.1}, {"eps": 3.0}, {"eps": 0.0}, {"momentum": None}, {"momentum": 0.5}]
)
def test_outputs_in_evaluation_stay(settings):
    norm = norm_of(**settings)

    assert agree(norm, inputs()) == []

    assert not norm.running_mean.any()
    assert bool((norm.running_var == 1).all())
    assert norm.num_batches_tracked == 37


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d, (4, 8)), (nn.BatchNorm1d, (4, 8, 5)), (nn.BatchNorm3d, (2, 8, 3, 3, 3))],
)
def test_all_dimensions_are_merged(layer, shape):
    assert agree(trained(layer(8)), torch.randn(shape)) == []


def test_synchronized_layers_are_merged():
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm_of()).eval()
    assert isinstance(norm, nn.SyncBatchNorm)

    assert agree(norm, inputs()) == []
    assert not norm.running_mean.any()


def test_float64_stays_exact_to_float64():
    norm = norm_of().double()

    assert agree(norm, inputs(dtype=torch.float64), rtol=1e-14) == []
    assert not norm.running_mean.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_few_digits_stay_and_are_named(dtype):
    norm = norm_of().to(dtype)
    before = bytes_of(snapshot(norm))

    skipped = merge_batchnorm(norm)

    assert bytes_of(norm.state_dict()) == before
    name = str(dtype).removeprefix("torch.")
    assert [(each.name, each.reason) for each in skipped] == [
        ("BatchNorm2d", f"its weight is {name}, which has too few digits: BatchNorm is not merged")
    ]


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * self.running_var.sum()


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    norm = norm_of()
    parametrize.register_parametrization(norm, "weight", Twice())
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: norm_of(track_running_stats=False), "it has no running statistics"),
        (lambda: norm_of(affine=False), "it has no weight and bias"),
        (lambda: trained(Scaled(8)), "Scaled has a forward of its own"),
        (parametrized, "its weight is computed, or is not in the state dict"),
    ],
    ids=["untracked", "not affine", "subclass", "parametrized"],
)
def test_what_cannot_be_merged_stays_and_is_named(make, reason):
    model = nn.Sequential(make(), norm_of())
    before = bytes_of(snapshot(model[0]))

    skipped = agree(model, inputs())

    assert [each.name for each in skipped] == ["0"]
    assert reason in skipped[0].reason
    assert bytes_of(model[0].state_dict()) == before
    assert not model[1].running_mean.any()
    assert merged_names(model) == {f"1.{vector}" for vector in VECTORS}


def test_lazy_layers_are_named():
    skipped = merge_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))

    assert [each.name for each in skipped] == ["0"]


@pytest.mark.parametrize("vector", VECTORS)
def test_layers_that_share_a_vector_stay_and_are_named(vector):
    model = nn.Sequential(norm_of(), trained(nn.BatchNorm2d(8), seed=1), norm_of())
    setattr(model[1], vector, getattr(model[0], vector))

    skipped = agree(model, inputs())

    assert [(each.name, each.reason.split(":")[0]) for each in skipped] == [
        ("0", f"its {vector} is also 1.{vector}"),
        ("1", f"its {vector} is also 0.{vector}"),
    ]
    assert not model[2].running_mean.any()


def test_a_layer_used_twice_is_merged_once():
    norm = norm_of()
    model = nn.Sequential(norm, nn.ReLU(), norm)

    assert agree(model, inputs()) == []
    assert merged_names(model) == {f"{index}.{vector}" for index in (0, 2) for vector in VECTORS}


def test_names_to_leave_stay():
    model = nn.Sequential(norm_of(), norm_of())
    before = bytes_of(snapshot(model[0]))

    skipped = merge_batchnorm(model, {"0.bias"})

    assert [(each.name, each.reason.split(":")[0]) for each in skipped] == [("0", "its bias is to stay as it is")]
    assert bytes_of(model[0].state_dict()) == before
    assert merged_names(model, {"0.bias"}) == {f"1.{vector}" for vector in VECTORS}


@pytest.mark.parametrize(
    ("vector", "value"),
    [("running_mean", 1e6), ("running_mean", math.nan), ("running_var", math.inf), ("weight", math.inf)],
)
def test_a_channel_that_rounding_would_move_stays_as_it_is(vector, value):
    norm = norm_of()
    with torch.no_grad():
        norm.running_var.fill_(0.5)
        getattr(norm, vector)[3] = value
        norm.weight[3].copysign_(norm.weight.new_ones(()))
    before = snapshot(norm)

    assert merge_batchnorm(norm) == []

    for name in VECTORS:
        own, old = norm.state_dict()[name], before[name]
        assert torch.equal(own[3:4].view(torch.int32), old[3:4].view(torch.int32)), name
    others = torch.arange(8) != 3
    assert not norm.running_mean[others].any()
    assert bool((norm.running_var[others] == 1).all())


def test_a_dead_channel_with_a_bias_before_it_keeps_its_output():
    """All weights before it are pruned: its input is the bias, its variance 0."""
    norm = nn.BatchNorm1d(4).eval()
    x = torch.tensor([[0.0, 0.01, 1.7, -300.0]])
    with torch.no_grad():
        norm.running_mean.copy_(x[0])
        norm.running_var.zero_()
        norm.bias.copy_(torch.tensor([0.5, -0.25, 1.0, 3.0]))

    merge_batchnorm(norm)

    double = norm.double()  # what rounding in the kernel adds is not ours
    torch.testing.assert_close(
        outputs(double, x.double())[0], torch.tensor([0.5, -0.25, 1.0, 3.0]).double(), rtol=1e-5, atol=1e-5
    )
    assert norm.running_mean[:2].tolist() == [0.0, 0.0]


def test_merging_twice_is_merging_once():
    norm = norm_of()
    merge_batchnorm(norm)
    once = bytes_of(snapshot(norm))

    assert merge_batchnorm(norm) == []
    assert bytes_of(norm.state_dict()) == once


FILES = [Files(merge_batchnorm=True), Files(merge_batchnorm=True, float16=True), Files(float16=True), Files()]


@pytest.mark.parametrize("files", FILES)
def test_the_model_gets_its_own_values_back(files):
    model = trained(cnn())
    plan = quantize(model, widths=(2, 4, 8))
    before, tensors = bytes_of(snapshot(model)), {**dict(model.named_parameters()), **dict(model.named_buffers())}

    with finished(model, files, set(plan.mask.keep)):
        inside = bytes_of(snapshot(model))
        assert (inside["1.running_mean"] != before["1.running_mean"]) == (files.merge_batchnorm or files.float16)
        assert all(inside[name] == before[name] for name in plan.mask.keep)
        assert (inside["9.bias"] != before["9.bias"]) == files.float16
    assert bytes_of(model.state_dict()) == before
    with pytest.raises(KeyboardInterrupt), finished(model, files, set(plan.mask.keep)):
        raise KeyboardInterrupt
    assert bytes_of(model.state_dict()) == before
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in tensors.items())


def test_rounding_is_of_the_merged_values_and_only_theirs():
    model = trained(cnn())
    with torch.no_grad():
        model[1].running_mean[0] = 0.5
    files = Files(float16=True, merge_batchnorm=True)
    merged = trained(cnn())
    merged.load_state_dict(model.state_dict())
    merge_batchnorm(merged)
    own = snapshot(model)

    assert round_module(model, files, set()) == []
    for name, tensor in own.items():
        vectors = name.startswith(("1.", "4."))
        assert torch.equal(model.state_dict()[name], tensor if vectors else tensor.half().to(tensor.dtype)), name
    with finished(model, files, set()) as skipped:
        assert skipped == []
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(model.state_dict()[name], tensor.half().float()), name


@pytest.mark.parametrize("files", FILES[:2])
def test_the_file_is_the_merged_model_to_the_bit_and_loads_into_the_same_module(tmp_path, files):
    model = trained(cnn())
    plan = quantize(model, widths=(2, 4, 8))
    x = torch.randn(3, 3, 8, 8)
    before = outputs(model, x)

    with finished(model, files, set(plan.mask.keep)):
        (artifact,) = save(model, plan, tmp_path, files=files)
        held = snapshot(model)

    assert artifact.max_abs_diff == 0
    loaded = load_compressed(artifact.path, cnn()).eval()
    assert list(loaded.state_dict()) == list(held)
    for name, tensor in held.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tolerance = 2e-3 if files.float16 else 1e-5
    assert float((outputs(loaded, x) - before).abs().max()) <= tolerance * float(before.abs().max())


@pytest.mark.parametrize("float16", [False, True])
def test_the_packed_file_is_smaller_by_two_of_the_four_vectors(float16):
    model = trained(nn.Sequential(*(nn.BatchNorm2d(1000) for _ in range(4))))

    statistics = nn.Module()  # a model of means and variances alone
    for index, norm in enumerate(model):
        statistics.register_buffer(f"mean{index}", norm.running_mean.clone())
        statistics.register_buffer(f"var{index}", norm.running_var.clone())

    sizes = {}
    for merge in (False, True):
        with finished(model, Files(float16=float16, merge_batchnorm=merge), set()):
            sizes[merge] = packed_size(model, PLAN).rest
    with finished(statistics, Files(float16=float16), set()):
        vectors = packed_size(statistics, PLAN).rest

    assert sizes[False] - sizes[True] == pytest.approx(vectors, rel=0.03)
    assert vectors > 0.4 * sizes[False]


@pytest.mark.parametrize("files", FILES)
def test_a_size_is_weighed_as_the_file_will_be(tmp_path, files):
    model = nn.Sequential(trained(cnn()), nn.BatchNorm1d(5, affine=False)).eval()
    plan = quantize(model, widths=(2, 4))
    before = bytes_of(snapshot(model))

    weighed = weigh(model, plan, files)

    assert bytes_of(model.state_dict()) == before
    with finished(model, files, set(plan.mask.keep)) as left:
        named = CompressionPlan(plan.mask, plan.allocation, plan.scales, (*plan.skipped, *left), plan.provenance)
        (artifact,) = save(model, named, tmp_path, files=files)
    assert [each.name for each in left] == (["1"] if files.merge_batchnorm else [])
    assert weighed == artifact.bytes


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_traced_files_of_a_merged_model_give_the_outputs_of_the_model(tmp_path, name):
    pytest.importorskip("onnx")
    model = trained(nn.Sequential(cnn(), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5)))  # the last follows no layer
    plan = quantize(model, widths=(2, 4, 8))
    examples = [Inputs((torch.randn(3, 3, 8, 8),))]
    files = Files(merge_batchnorm=True)

    with finished(model, files, set(plan.mask.keep)):
        (artifact,) = save(model, plan, tmp_path, formats=(name,), examples=examples, files=files)
    path = tmp_path / FORMATS[name].filename

    assert artifact.max_abs_diff < 1e-5
    if name == "onnx":  # against the model as it was
        assert FORMATS[name].check(path, model, examples, files) < 1e-5
        assert operators(path).count("BatchNormalization") == 1
    else:
        program = torch.export.load(path).module()
        expected = outputs(model, *examples[0].args)
        assert float((program(*examples[0].args) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_the_setting_is_true_or_false():
    with pytest.raises(ValueError, match="merge_batchnorm must be True or False, got 'yes'"):
        Files(merge_batchnorm="yes")
