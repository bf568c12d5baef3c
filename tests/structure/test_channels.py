"""Which channels are coupled, and that a network without some computes what it computes with them masked."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xai_compress import CompressionError, Mask
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.plan import BitAllocation, CompressionPlan
from lightning_xai_compress.structure import (
    channel_mask,
    find_channels,
    flattened_otherwise,
    kept_entries,
    shrunk,
    shrunk_plan,
    undisturbed,
    unlike,
)

from channel_nets import NETS, Chain, Concat, Depthwise, Grouped, Heads, Normalized, Residual, Shuffled, Tied, made

pytest.importorskip("torch_pruning")


def groups_of(net, x, exclude=()):
    return find_channels(net, (x,), {}, find_layers(net, exclude=exclude).names)


def random_choice(groups, share=0.4):
    chosen = {}
    for group in groups:
        gone = torch.zeros(len(group), dtype=torch.bool)
        gone[torch.randperm(len(group))[: max(1, int(share * len(group)))]] = True
        chosen[group.name] = gone
    return chosen


def masked(net, groups, removed):
    """A copy of the network with the weights of removed channels at zero."""
    other = copy.deepcopy(net)
    weights = {name: weight for name, weight in other.named_parameters() if weight.dim() > 1}
    mask = channel_mask(groups, removed, weights)
    for name, weight in weights.items():
        weight.data.mul_(mask[name])
    return other


@pytest.mark.parametrize("kind", NETS)
def test_the_smaller_network_computes_what_the_masked_one_does(kind):
    net, x = made(kind)
    groups, _ = groups_of(net, x)
    removed = random_choice(groups)
    whole = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = net(x)

    expected = masked(net, groups, removed)(x)
    with shrunk(net, groups, removed) as kept:
        found = net(x)
        small = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        settled = copy.deepcopy(net)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, before)
    assert sum(map(torch.Size.numel, map(torch.Size, small.values()))) < sum(map(torch.Tensor.numel, whole.values()))
    assert set(kept) == {name for name, shape in small.items() if shape != tuple(whole[name].shape)}
    # afterwards it is as it was, and a copy stays small
    assert all(torch.equal(tensor, whole[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(x), before)
    assert torch.equal(settled(x), found)


@pytest.mark.parametrize("kind", NETS)
def test_layers_say_the_sizes_that_their_tensors_have(kind):
    net, x = made(kind)
    groups, _ = groups_of(net, x)

    with shrunk(net, groups, random_choice(groups)):
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
            elif isinstance(module, nn.ConvTranspose2d):
                assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
            elif isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.num_features == len(module.running_mean) == len(module.bias)
        text = repr(net)
    assert repr(net) != text


def test_a_residual_connection_couples_what_it_adds():
    groups, skipped = groups_of(*made(Residual))

    found = {group.name: {(part.name, part.axis) for part in group.slices} for group in groups}
    stream = next(parts for name, parts in found.items() if name != "inner.weight")
    assert {("stem.weight", 0), ("outer.weight", 0), ("inner.weight", 1), ("head.weight", 1)} <= stream
    assert {("norm.weight", 0), ("norm.running_var", 0), ("outer.bias", 0)} <= stream
    assert found["inner.weight"] == {("inner.weight", 0), ("inner.bias", 0), ("outer.weight", 1)}
    assert [(entry.name, entry.reason) for entry in skipped] == [
        ("head.weight", "its channels stay: nothing in the model uses them but its output")
    ]
    assert {part.name for group in groups for part in group.makers} == {"stem.weight", "outer.weight", "inner.weight"}


def test_concatenated_channels_go_by_themselves():
    groups, _ = groups_of(*made(Concat))

    parts = {group.name: {part.name: part.index for part in group.slices} for group in groups}
    assert parts["left.weight"]["norm.weight"].flatten().tolist() == list(range(16))
    assert parts["right.weight"]["join.weight"].flatten().tolist() == list(range(16, 40))


def test_a_flattened_channel_takes_all_its_positions_with_it():
    groups, _ = groups_of(*made(Chain))

    second = next(group for group in groups if group.name == "second.weight")
    index = next(part.index for part in second.slices if part.name == "hidden.weight")
    assert index.shape == (24, 4)
    assert index[2].tolist() == [8, 9, 10, 11]


def test_a_depthwise_convolution_goes_with_what_it_reads():
    net, x = made(Depthwise)
    groups, _ = groups_of(net, x)
    assert sorted(map(len, groups)) == [8, 16]

    with shrunk(net, groups, {group.name: torch.arange(len(group)) % 2 == 0 for group in groups}):
        assert (net.depth.groups, net.depth.in_channels, net.depth.out_channels) == (8, 8, 8)
    assert net.depth.groups == 16


def test_groups_of_a_convolution_lose_the_same_places():
    net, x = made(Grouped)
    groups, _ = groups_of(net, x)

    sizes = {group.name: len(group) for group in groups}
    assert sizes == {"before.weight": 8, "grouped.weight": 16, "after.weight": 8}  # 4 groups of 8 and of 16
    removed = {"before.weight": torch.arange(8) == 3}
    kept = kept_entries(groups, removed, {"before.weight": (32, 1, 1, 1), "grouped.weight": (64, 8, 3, 3)})
    assert sorted(set(range(32)) - set(kept["before.weight"][0].tolist())) == [3, 11, 19, 27]
    assert kept["grouped.weight"][1].tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_tied_weights_keep_their_channels():
    groups, skipped = groups_of(*made(Tied))

    assert [group.name for group in groups] == ["free.weight"]
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["stem.weight"] == "its channels stay: one shares its weight with another layer"
    assert reasons["one.weight"] == "its channels stay: one shares its weight with another layer"


def test_what_a_norm_looks_at_together_stays_and_is_named():
    groups, skipped = groups_of(*made(Normalized))

    assert [group.name for group in groups] == ["wide.weight"]
    assert {entry.reason for entry in skipped} == {
        "its channels stay: norm (LayerNorm) looks at all of them together",
        "its channels stay: nothing in the model uses them but its output",
    }


def test_heads_go_as_a_whole_and_their_module_counts_them():
    net, x = made(Heads)
    groups, _ = groups_of(net, x)

    found = {group.name: [(part.name, part.axis, part.makes) for part in group.slices] for group in groups}
    assert found["one.q_proj.weight"][-1] == ("one.proj.weight", 1, False)
    assert {name for name, _, makes in found["one.q_proj.weight"] if makes} == {
        f"one.{each}_proj.weight" for each in "qkv"
    }
    assert found.keys() == {"one.q_proj.weight", "two.qkv.weight"}
    fused = next(group for group in groups if group.name == "two.qkv.weight")
    assert fused.slices[0].index[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]
    removed = {group.name: torch.tensor([False, True, False, False]) for group in groups}
    with shrunk(net, groups, removed):
        assert (net.two.num_heads, net.two.inner_dim, net.two.qkv.out_features, net.two.proj.in_features) == (
            3,
            12,
            36,
            12,
        )
        assert net.one.num_heads == 3
    assert (net.two.num_heads, net.two.inner_dim, net.one.num_heads) == (4, 16, 4)


def test_what_needs_an_excluded_layer_stays():
    groups, skipped = groups_of(*made(Residual), exclude=["outer"])

    assert groups == []
    staying = {entry.name for entry in skipped if "outer, which is not compressed, shares them" in entry.reason}
    assert staying == {"stem.weight", "inner.weight", "outer.weight"}


def test_what_the_graph_does_not_understand_shows_in_a_trial():
    net, x = made(Shuffled)
    groups, _ = groups_of(net, x)

    found = {group.name: unlike(net, [group], random_choice([group]), (x,), {}) for group in groups}

    assert found
    assert all("fails" in reason or "differs" in reason for reason in found.values())
    other, x = made(Residual)
    groups, _ = groups_of(other, x)
    assert unlike(other, groups, random_choice(groups), (x,), {}) == ""


class Permuted(nn.Module):
    """Flattened with some places before the channel, and some behind."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes
        self.first, self.head = nn.Conv2d(1, 12, 3), nn.Linear(12 * 4 * 3, 5)

    def forward(self, x):
        return self.head(F.relu(self.first(x)).permute(0, *self.axes).flatten(1))


@pytest.mark.parametrize(
    ("axes", "first"),
    [((2, 1, 3), [0, 1, 2, 36, 37, 38, 72, 73, 74, 108, 109, 110]), ((2, 3, 1), [*range(0, 144, 12)])],
)
def test_of_a_flatten_after_a_permutation_one_other_order_is_right(axes, first):
    torch.manual_seed(0)
    net, x = Permuted(axes).eval(), torch.randn(3, 1, 6, 5)
    (group,), _ = groups_of(net, x)
    removed = random_choice([group])

    right = [other for other in flattened_otherwise(group) if not unlike(net, [other], removed, (x,), {})]

    assert unlike(net, [group], removed, (x,), {})
    assert len(right) == 1
    assert next(part.index[0].tolist() for part in right[0].slices if part.name == "head.weight") == first
    assert not unlike(net, right, removed, (x,), {})


class Offset(Shuffled):
    """What is wrong is small beside a constant."""

    def forward(self, x):
        return super().forward(x) + 300


@pytest.mark.parametrize("kind", [Shuffled, Offset])
def test_a_trial_sees_a_mistake_that_zeros_or_a_constant_hide(kind):
    net, x = made(kind)
    nn.init.zeros_(net.head.weight)
    groups, _ = groups_of(net, x)

    assert groups
    for group in groups:
        assert unlike(net, [group], random_choice([group]), (x,), {})
    assert not net.head.weight.any()


def test_a_trial_that_shows_nothing_is_none():
    class Hidden(Chain):
        def forward(self, x):
            return super().forward(x).detach() * 0

    net, x = made(Chain)
    groups, _ = groups_of(net, x)
    hidden, _ = made(Hidden)

    assert "nothing can be tried" in unlike(hidden, groups, random_choice(groups), (x,), {})


def test_a_model_that_draws_numbers_is_tried_with_the_same_ones():
    class Noisy(Chain):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    net, x = made(Noisy)
    groups, _ = groups_of(net, x)

    assert not unlike(net, groups, random_choice(groups), (x,), {})


def test_what_forward_passes_do_to_buffers_does_not_last():
    net = nn.BatchNorm1d(3)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()

    with undisturbed(net):
        net(torch.randn(5, 3))
        assert int(net.num_batches_tracked) == 1

    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gate", "spread"])
def test_a_single_channel_that_meets_all_of_another_layer_keeps_them(kind):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.head = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 1, 1), nn.Linear(16, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            gate = self.gate(x)
            return self.head((x * gate.sigmoid() if kind == "gate" else x + gate).mean((2, 3)))

    torch.manual_seed(0)
    net, x = Gate().eval(), torch.randn(2, 1, 4, 4)

    groups, skipped = groups_of(net, x)

    named = {entry.name for entry in skipped}
    for weight in ("first.weight", "gate.weight"):
        assert weight in named
    assert groups == []


def test_a_layer_of_two_names_loses_channels():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 16, 1), nn.Linear(16, 3)
            self.features = nn.Sequential(self.conv, nn.ReLU())

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))

    torch.manual_seed(0)
    net, x = Alias().eval(), torch.randn(2, 1, 4, 4)
    groups, _ = groups_of(net, x)

    assert [group.name for group in groups] == ["conv.weight"]
    assert not unlike(net, groups, random_choice(groups), (x,), {})


def test_nothing_is_read_otherwise_where_nothing_is_flattened():
    assert not [other for group in groups_of(*made(Residual))[0] for other in flattened_otherwise(group)]


def test_a_model_that_cannot_be_traced_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).detach().numpy()

    with pytest.raises(CompressionError, match=r"Odd cannot be traced .* needs a forward that returns tensors"):
        find_channels(Odd(), (torch.randn(2, 4),), {}, ["layer.weight"])


def test_the_plan_shrinks_with_the_model():
    net, x = made(Chain)
    groups, _ = groups_of(net, x)
    removed = random_choice(groups)
    weights = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
    bits = {name: (2 + torch.arange(len(weight)) % 7).to(torch.uint8) for name, weight in weights.items()}
    scales = {name: torch.arange(len(weight)).float() for name, weight in weights.items()}
    sizes = {name: weight[0].numel() for name, weight in weights.items()}
    keep = {name: torch.rand_like(weight) > 0.3 for name, weight in weights.items()}
    plan = CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales)

    with shrunk(net, groups, removed) as kept:
        found = shrunk_plan(plan, kept)
        shapes = {name: tuple(weight.shape) for name, weight in net.named_parameters()}

    left = ~removed["second.weight"]
    assert torch.equal(found.allocation["second.weight"], bits["second.weight"][left])
    assert torch.equal(found.scales["second.weight"], scales["second.weight"][left])
    for name in weights:
        assert found.mask[name].shape == shapes[name]
        assert found.allocation.channel_size[name] == found.mask[name][0].numel()
    assert torch.equal(found.allocation["head.weight"], bits["head.weight"])
