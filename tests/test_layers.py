"""What is compressible, and what is named instead."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_xai_compress import CompressionError
from lightning_xai_compress.layers import find_layers, find_scorable


class Tied(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.enc, self.dec, self.head = first, nn.Linear(4, 4), nn.Linear(4, 2)
        self.dec.weight = self.enc.weight


def reasons(layers):
    return {entry.name: entry.reason for entry in layers.skipped}


def test_linear_and_convolutions_are_found_by_parameter_name():
    convolutions = nn.Conv1d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3)
    model = nn.Sequential(*convolutions, nn.BatchNorm2d(2), nn.Linear(2, 2))

    layers = find_layers(model)

    assert layers.names == ("0.weight", "1.weight", "2.weight", "4.weight")
    assert layers.skipped == ()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GRU(2, 2), "recurrent layer"),
        (nn.LSTMCell(2, 2), "recurrent layer"),
        (nn.Embedding(4, 2, sparse=True), "embedding with sparse gradients"),
        (nn.Embedding(4, 2, max_norm=1.0), "embedding with max_norm"),
        (nn.EmbeddingBag(4, 2), "EmbeddingBag holds weights of its own"),
        (nn.Bilinear(2, 2, 2), "Bilinear holds weights of its own"),
        (nn.LazyLinear(3), "lazy layer"),
        (prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), "masked by torch.nn.utils"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "parametrized"),
        (nn.Linear(2, 2).to(dtype=torch.complex64), "not real floating point"),
    ],
)
def test_what_is_not_compressed_is_named_with_its_reason(layer, reason):
    layers = find_layers(nn.ModuleDict({"odd": layer, "head": nn.Linear(2, 2)}))

    assert "head.weight" in layers.names
    assert not any(name == "odd.weight" for name in layers.names)
    assert any(name.startswith("odd") and reason in why for name, why in reasons(layers).items())


@pytest.mark.parametrize("pattern", ["enc", "dec", "enc.weight"])
def test_a_tied_weight_is_left_alone_under_all_of_its_names(pattern):
    layers = find_layers(Tied(nn.Linear(4, 4)), exclude=[pattern])

    assert layers.names == ("head.weight",)


def test_a_weight_tied_to_an_embedding_is_found_once():
    assert find_layers(Tied(nn.Embedding(4, 4))).names == ("enc.weight", "head.weight")


def test_a_weight_tied_to_an_embedding_that_is_left_alone_is_left_alone():
    layers = find_layers(Tied(nn.Embedding(4, 4, sparse=True)))

    assert layers.names == ("head.weight",)
    assert "sparse" in reasons(layers)["enc"]


def test_embeddings_transposed_convolutions_and_attention_are_found():
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose1d(1, 1, 1), "embed": nn.Embedding(3, 2), "attention": nn.MultiheadAttention(4, 2),
            "separate": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        }
    )  # fmt: skip

    layers = find_layers(model)

    assert layers.names == (
        "attention.in_proj_weight", "attention.out_proj.weight", "embed.weight", "separate.k_proj_weight",
        "separate.out_proj.weight", "separate.q_proj_weight", "separate.v_proj_weight", "up.weight",
    )  # fmt: skip
    assert layers.skipped == ()


@pytest.mark.parametrize("pattern", ["attention", "attention.in_proj_weight"])
def test_attention_is_excluded_by_its_name_or_that_of_its_weight(pattern):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(2, 2)})

    layers = find_layers(model, exclude=[pattern])

    assert layers.names == ("attention.out_proj.weight", "head.weight")
    assert reasons(layers) == {"attention": f"excluded by {pattern!r}"}


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(CompressionError, match=r"Sequential has nothing to compress.*0: excluded by '\*'"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), exclude=["*"])


def test_scorable_are_also_transposed_convolutions_embeddings_attention_and_masked_weights():
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(2, 2), "conv": nn.Conv3d(1, 1, 1), "up": nn.ConvTranspose1d(1, 1, 1),
            "embed": nn.Embedding(3, 2), "attention": nn.MultiheadAttention(4, 2),
            "separate": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "masked": prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), "norm": nn.BatchNorm1d(2),
        }
    )  # fmt: skip

    layers = find_scorable(model)

    assert layers.names == (
        "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "embed.weight", "fc.weight",
        "masked.weight_orig", "separate.k_proj_weight", "separate.out_proj.weight", "separate.q_proj_weight",
        "separate.v_proj_weight", "up.weight",
    )  # fmt: skip
    assert layers.skipped == ()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GRU(2, 2), "recurrent layer: not scored"),
        (nn.LSTMCell(2, 2), "recurrent layer: not scored"),
        (nn.Bilinear(2, 2, 2), "Bilinear holds weights of its own: not scored"),
        (nn.EmbeddingBag(3, 2), "EmbeddingBag holds weights of its own: not scored"),
        (nn.LazyLinear(3), "lazy, or not real floating point: not scored"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "its weight is parametrized: not scored"),
        (nn.Linear(2, 2).to(dtype=torch.complex64), "lazy, or not real floating point: not scored"),
    ],
)
def test_what_cannot_be_scored_is_named_with_its_reason(layer, reason):
    layers = find_scorable(nn.ModuleDict({"odd": layer, "head": nn.Linear(2, 2)}))

    assert layers.names == ("head.weight",)
    assert reasons(layers)["odd"] == reason


def test_a_tied_weight_is_scored_once_under_its_first_name():
    assert find_scorable(Tied(nn.Linear(4, 4))).names == ("enc.weight", "head.weight")


@pytest.mark.parametrize("find", [find_layers, find_scorable])
def test_what_is_no_module_has_no_layers(find):
    with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module, got a list"):
        find([nn.Linear(2, 2)])


def test_scripted_layers_are_named_and_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2))

    layers = find_layers(model)

    assert layers.names == ("2.weight",)
    assert reasons(layers) == {"0": "scripted by torch.jit: neither scored nor quantized"}
