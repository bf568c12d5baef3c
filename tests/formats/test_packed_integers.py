import copy
import sys

import pytest
import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.packed import load_compressed, pack
from lightning_xai_compress.plan import BitAllocation, CompressionPlan, Mask

from packed_nets import Net, assert_same, compressed, quantize


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 8)).to(dtype).eval()


def saved(model, names, path, **settings):
    path.write_bytes(pack(model, quantize(model, names, **settings)))
    return path


def is_integer(parameter):
    return isinstance(parameter, IntxUnpackedToInt8Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 6, 7, 8), (4,), (2, 8)])
def test_linear_weights_become_integers_that_give_the_very_weights(tmp_path, dtype, widths):
    model = network(dtype)
    path = saved(model, ["0.weight", "3.weight"], tmp_path / "m", widths=widths)
    torch.manual_seed(1)
    fresh = network(dtype)

    assert load_compressed(path, fresh, integers=True) is fresh

    for layer in (0, 3):
        weight = fresh[layer].weight
        assert is_integer(weight)
        assert not weight.requires_grad
        assert weight.dtype == dtype
        assert weight.target_dtype == getattr(torch, f"int{max(widths)}")
        assert weight.qdata.dtype == torch.int8
        assert int(weight.qdata.abs().max()) == 2 ** (max(widths) - 1) - 1
        assert weight.qdata.untyped_storage().nbytes() == weight.numel()
        torch.testing.assert_close(weight.dequantize(), model[layer].weight.detach(), rtol=0, atol=0)
    x = torch.randn(5, 20, dtype=dtype)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_everything_else_is_filled_as_usual(tmp_path):
    model, plan = compressed()
    (tmp_path / "m").write_bytes(pack(model, plan))
    torch.manual_seed(1)
    fresh = load_compressed(tmp_path / "m", Net(), integers=True)

    assert is_integer(fresh.head.weight)
    assert not is_integer(fresh.conv.weight)
    state = fresh.state_dict()
    state["head.weight"] = state["head.weight"].dequantize()
    assert_same(state, model)


def test_a_linear_weight_that_is_not_quantized_stays_a_float(tmp_path):
    model = network()
    fresh = load_compressed(saved(model, ["0.weight"], tmp_path / "m"), network(), integers=True)

    assert is_integer(fresh[0].weight)
    assert type(fresh[3].weight) is nn.Parameter
    assert torch.equal(fresh[3].weight, model[3].weight)
    assert fresh[3].weight.requires_grad


def test_float64_stays_a_float(tmp_path):
    model = network(torch.float64)
    fresh = load_compressed(saved(model, ["0.weight"], tmp_path / "m"), network(torch.float64), integers=True)

    assert type(fresh[0].weight) is nn.Parameter
    assert torch.equal(fresh[0].weight, model[0].weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12)
        self.head.weight = self.embed.weight
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight


def test_shared_weights_stay_shared(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    path = saved(model, ["embed.weight", "one.weight"], tmp_path / "m")
    fresh = load_compressed(path, Tied(), integers=True)

    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.embed.weight, model.embed.weight)
    assert is_integer(fresh.one.weight)
    assert fresh.two.weight is fresh.one.weight
    assert torch.equal(fresh.one.weight.dequantize(), model.one.weight)


def test_weights_that_only_the_file_ties_each_become_integers(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    path = saved(model, ["0.weight"], tmp_path / "m")
    fresh = load_compressed(path, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), integers=True)

    assert is_integer(fresh[0].weight)
    assert is_integer(fresh[1].weight)
    assert torch.equal(fresh[1].weight.dequantize(), model[0].weight)


def test_weights_that_only_the_model_ties_are_refused_where_they_differ(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    path = saved(model, ["0.weight", "1.weight"], tmp_path / "m")
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    before = copy.deepcopy(tied.state_dict())

    with pytest.raises(ArtifactError, match=r"different values for 0\.weight, 1\.weight, which share one tensor"):
        load_compressed(path, tied, integers=True)
    assert_same(before, tied)


def test_a_layer_under_two_names_becomes_integers_once(tmp_path):
    def twice():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = twice()
    fresh = load_compressed(saved(model, ["0.weight"], tmp_path / "m"), twice(), integers=True)

    assert fresh[0] is fresh[2]
    assert is_integer(fresh[0].weight)
    assert torch.equal(fresh[0].weight.dequantize(), model[0].weight)


def test_a_model_that_is_one_linear_layer_becomes_integers(tmp_path):
    model = nn.Linear(9, 5)
    fresh = load_compressed(saved(model, ["weight"], tmp_path / "m"), nn.Linear(9, 5), integers=True)

    assert torch.equal(fresh.weight.dequantize(), model.weight)


@pytest.mark.parametrize("gradient", [True, False])
def test_attention_still_runs(tmp_path, gradient):
    def layer():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    model = layer()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    fresh = load_compressed(saved(model, names, tmp_path / "m"), layer(), integers=True)

    assert is_integer(fresh.linear1.weight)
    assert not is_integer(fresh.self_attn.out_proj.weight)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(gradient):
        torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-6)


def test_channels_of_nothing_but_zeros_are_zero(tmp_path):
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    bits = {"weight": torch.tensor([4, 4], dtype=torch.uint8)}
    plan = CompressionPlan(Mask({}), BitAllocation(bits, {"weight": 3}), {"weight": torch.zeros(2)})
    (tmp_path / "m").write_bytes(pack(model, plan))

    fresh = load_compressed(tmp_path / "m", nn.Linear(3, 2), integers=True)

    assert torch.equal(fresh.weight.dequantize(), torch.zeros(2, 3))


def test_integers_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"integers=True expected a model .* got none: call load_"):
        load_compressed(tmp_path / "m", None, integers=True)


def test_integers_without_torchao_are_refused_and_the_model_untouched(tmp_path, monkeypatch):
    path = saved(network(), ["0.weight"], tmp_path / "m")
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = network()
    before = copy.deepcopy(fresh.state_dict())

    with pytest.raises(ImportError, match=r"integers=True expected torchao .* got none: pip install 'torchao>=0\.18'"):
        load_compressed(path, fresh, integers=True)
    assert_same(before, fresh)


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path):
    path = saved(network(), ["0.weight"], tmp_path / "m")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fresh = network()
    before = copy.deepcopy(fresh.state_dict())

    with pytest.raises(ArtifactError, match="expected SHA-256"):
        load_compressed(path, fresh, integers=True)
    assert_same(before, fresh)
    assert not is_integer(fresh[0].weight)


def test_a_model_that_holds_integers_is_not_half_filled(tmp_path):
    for seed, name in ((0, "one"), (1, "two")):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        plan = quantize(model, ["0.weight", "2.weight"], seed=seed)
        (tmp_path / name).write_bytes(pack(model, plan))
    model = load_compressed(
        tmp_path / "one", nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), integers=True
    )
    before, x = model[0].bias.clone(), torch.randn(3, 8)
    outputs = model(x)

    with pytest.raises(ArtifactError, match=r"cannot fill 0\.weight, 2\.weight .*integers of an earlier"):
        load_compressed(tmp_path / "two", model)

    assert torch.equal(model[0].bias, before)
    assert torch.equal(model(x), outputs)
    with pytest.raises(ArtifactError, match=r"expected a plain tensor.*load the model without integers=True"):
        pack(model, CompressionPlan(Mask({})))
    other = load_compressed(tmp_path / "two", model, integers=True)
    assert torch.equal(other[0].weight.dequantize(), load_compressed(tmp_path / "two")["0.weight"])
