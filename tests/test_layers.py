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
        (nn.ConvTranspose2d(2, 2, 2), "transposed convolution"),
        (nn.Embedding(4, 2), "embedding"),
        (nn.MultiheadAttention(2, 1), "attention input projection"),
        (nn.Bilinear(2, 2, 2), "Bilinear holds weights but is no Linear or Conv1d/2d/3d"),
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


def test_a_weight_tied_to_an_embedding_is_left_alone():
    layers = find_layers(Tied(nn.Embedding(4, 4)))

    assert layers.names == ("head.weight",)
    assert "embedding" in reasons(layers)["enc"]


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
