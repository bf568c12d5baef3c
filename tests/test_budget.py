"""Sparsity and bits that fill a number of bytes: against a plain scan over many sparsities."""

import copy

import pytest
import torch
from torch import nn

from lightning_xai_compress import BudgetError, Files, ScoreMap, select_mask
from lightning_xai_compress.budget import (
    _GRAIN,
    CLOSE,
    HIGHEST,
    VALUE_BITS,
    Candidate,
    Drafts,
    _closest,
    check_least,
    check_target_size,
    expected_sparsity,
    points_lost,
    replaced,
    target_bytes,
    weigh,
)
from lightning_xai_compress.formats import entropy_price, packed_size
from lightning_xai_compress.plan import CompressionPlan
from lightning_xai_compress.pruning import Choice
from lightning_xai_compress.quantization import measure_widths, quantize
from lightning_xai_compress.report import estimated_bytes

NAMES = ("0.weight", "2.weight")


def drafts(*, bits=(2, 8), choice=None, files=None, previous=None):
    """Of a model of 40 x 30 + 10 x 40 weights, scored by magnitude, with a BatchNorm between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 10))
    with torch.no_grad():
        model[1].running_mean.normal_()
    weights = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    scores = ScoreMap({name: each.abs() for name, each in weights.items()}, weights, weights, samples=1)
    costs = ScoreMap(scores.score, weights, {name: torch.ones_like(each) for name, each in weights.items()}, samples=1)
    return Drafts(
        model,
        weights,
        select=lambda sparsity: select_mask(scores, sparsity, previous=previous, choice=choice).mask,
        measure=lambda masked: measure_widths(masked, costs, bits=bits, price=entropy_price),
        files=files or Files(),
    )


def real_bytes(own, candidate):
    """Those of the file of a model that holds the candidate."""
    model = copy.deepcopy(own.model)
    allocation, scales = candidate.allocated.allocation, candidate.allocated.scales
    plan = CompressionPlan(candidate.mask, allocation, scales, own.skipped, own.provenance)
    with torch.no_grad():
        for name in NAMES:
            masked = own.weights[name] * candidate.mask[name]
            model.get_parameter(name).copy_(quantize(masked, allocation[name], scales[name]))
    return weigh(model, plan, own.files)


@pytest.mark.parametrize("guess", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("shape", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("step", [1, 7, 40])
def test_the_search_finds_what_a_scan_of_all_arguments_finds(shape, step, guess):
    def weighed(density):  # rises with the density, by steps, as bytes do
        calls.append(density)
        return Candidate(None, None, 500 + step * int(10_000 / step * density**shape))

    calls = []
    scan = [weighed(place / 2_000) for place in range(2_001)]
    for limit in (700, 1234, 5000, 10_400):
        calls.clear()
        best = max(each.bytes for each in scan if each.bytes <= limit)
        found = _closest(weighed, 1e-6, 1.0, limit, guess=guess)
        assert min(best, limit - max(CLOSE * limit, _GRAIN)) - step <= found.bytes <= limit
        assert len(calls) <= 17
    assert _closest(weighed, 1e-6, 1.0, 400, guess=guess).bytes == weighed(1e-6).bytes  # nothing fits
    assert _closest(weighed, 1e-6, 1.0, 20_000, guess=guess).bytes == scan[-1].bytes  # all does


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": (3,)}, {"files": Files(float16=True)}, {"choice": Choice(floor=0.2, scope="layer")}],
    ids=["plain", "one width", "float16", "floors"],
)
def test_pruning_goes_as_far_as_a_scan_over_sparsities_does(settings):
    own = drafts(**settings)
    before = {name: each.clone() for name, each in own.model.state_dict().items()}
    scan = [own._at(sparsity, VALUE_BITS) for sparsity in (0.45, 0.55, 0.65, 0.75)]
    limit = (scan[1].bytes + scan[2].bytes) / 2

    found = own.pruned(limit, VALUE_BITS)

    assert limit * 0.98 <= found.bytes <= limit
    assert found.bytes == real_bytes(own, found)
    assert 0.55 < found.mask.sparsity < 0.65
    assert [each.bytes for each in scan] == sorted((each.bytes for each in scan), reverse=True)
    assert all(torch.equal(each, before[name]) for name, each in own.model.state_dict().items())


def test_the_ends_of_the_search_are_what_was_asked_for_and_all_that_may_go():
    own = drafts()

    assert own.pruned(10**6, VALUE_BITS, low=0.3).mask.sparsity == pytest.approx(0.3, abs=1e-3)
    least = own.smallest()
    assert own.pruned(1, VALUE_BITS).mask.pruned == least.mask.pruned
    assert sum(int(keep.sum()) for keep in least.mask.keep.values()) == 2  # a weight a layer
    assert set(torch.cat([*least.allocated.allocation.bits.values()]).tolist()) == {2}


@pytest.mark.parametrize("files", [Files(), Files(float16=True)], ids=["float32", "float16"])
def test_widths_fill_what_pruning_leaves(files):
    own = drafts(files=files)
    narrow, wide = (own.filled(limit, 0.5) for limit in (1, 10**6))
    limit = (narrow.bytes + wide.bytes) / 2

    found = own.filled(limit, 0.5)

    assert set(torch.cat([*narrow.allocated.allocation.bits.values()]).tolist()) == {2}
    assert set(torch.cat([*wide.allocated.allocation.bits.values()]).tolist()) == {8}
    assert limit * 0.99 <= found.bytes <= limit
    assert found.bytes == real_bytes(own, found)
    assert found.mask.sparsity == narrow.mask.sparsity == 0.5
    assert wide.allocated.cost < found.allocated.cost < narrow.allocated.cost


def test_more_bytes_never_cost_more_error():
    own = drafts()

    costs = [own.filled(limit, 0.4).allocated.cost for limit in range(1800, 2700, 300)]

    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_trimming_prunes_as_little_as_fits_and_keeps_widths_and_scales():
    start = drafts().filled(2200, 0.4)
    allocated = start.allocated
    plan = CompressionPlan(start.mask, allocated.allocation, allocated.scales)
    own = drafts(previous=start.mask)

    limit = 0.93 * start.bytes

    found = own.trimmed(limit, plan)

    assert limit * 0.99 <= found.bytes <= limit
    assert found.bytes == real_bytes(own, found)
    assert found.mask.sparsity > start.mask.sparsity
    assert not any(bool((found.mask[name] & ~start.mask[name]).any()) for name in NAMES)
    assert found.allocated.allocation is allocated.allocation
    assert found.allocated.scales is allocated.scales
    assert own.trimmed(10**6, plan).mask.sparsity == start.mask.sparsity


def test_what_a_model_holds_in_between_is_undone_to_the_last_bit():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.extra = model[0].weight  # tied
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([float("nan"), -0.0, 1e-42])
    before = {name: each.clone().view(-1).numpy().tobytes() for name, each in model.state_dict().items()}

    with pytest.raises(ArithmeticError), replaced(model, {"extra": torch.ones(3, 3)}):  # noqa: PT012
        assert bool((model.extra == 1).all())
        model[1].running_mean.fill_(7)
        model[0].bias.data.zero_()
        raise ArithmeticError

    after = {name: each.view(-1).numpy().tobytes() for name, each in model.state_dict().items()}
    assert after == before
    assert model.extra is model[0].weight


def test_a_model_is_weighed_as_its_file_will_be_written():
    own = drafts()
    found = own.filled(2200, 0.4)
    plan = CompressionPlan(found.mask, found.allocated.allocation, found.allocated.scales)
    before = {name: each.clone() for name, each in own.model.state_dict().items()}
    with torch.no_grad():
        for name in NAMES:
            masked = own.weights[name] * found.mask[name]
            own.model.get_parameter(name).copy_(quantize(masked, plan.allocation[name], plan.scales[name]))

    plain, half, merged = (
        weigh(own.model, plan, files)
        for files in (Files(), Files(float16=True), Files(float16=True, merge_batchnorm=True))
    )

    assert plain == packed_size(own.model, plan).total
    assert merged < half < plain
    assert all(torch.equal(each, before[name]) for name, each in own.model.state_dict().items() if name not in NAMES)


@pytest.mark.parametrize("wrong", [0, 1.0, 1.5, -3, 0.0, float("nan"), True, "0.1", None])
def test_what_is_no_target_is_refused(wrong):
    with pytest.raises(ValueError, match="target_size must be"):
        check_target_size(wrong)


def test_a_target_is_a_share_or_a_number_of_bytes():
    assert target_bytes(check_target_size(0.025), 1000) == 25
    assert target_bytes(check_target_size(999), 1000) == 999
    with pytest.raises(ValueError, match="target_size=1000 bytes is no smaller than the dense file, which has 1,000"):
        target_bytes(1000, 1000)


def test_a_target_that_cannot_be_met_names_what_could_still_help():
    check_least(100, 100, Files())
    with pytest.raises(
        BudgetError, match=r"100 bytes are wanted, but .* still has 1,010 .*float16=True.*merge_batchnorm"
    ):
        check_least(1010, 100, Files())
    with pytest.raises(BudgetError) as error:
        check_least(1010, 100, Files(float16=True, merge_batchnorm=True))
    assert "Files(" not in str(error.value)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_expected_sparsity_has_the_expected_size(share):
    dense, weights = 41_000, 10_000
    target = int(share * dense)

    sparsity = expected_sparsity(target, dense, weights, 4.0)

    most, least = estimated_bytes(dense, weights, 0.0, 4.0), dense - 4 * weights
    wanted = min(max(target, least), most)

    assert estimated_bytes(dense, weights, sparsity, 4.0) == pytest.approx(wanted, abs=4)
    assert 0 <= sparsity <= HIGHEST
    assert expected_sparsity(10, dense, weights, 4.0) == HIGHEST  # nothing would do


def test_points_are_hundredths_of_shares():
    assert points_lost(0.93, 0.92, "max") == pytest.approx(1)
    assert points_lost(93, 92, "max") == pytest.approx(1)
    assert points_lost(0.5, 0.25, "min") == pytest.approx(-25)
    assert points_lost(-2.0, -3.0, "min") == pytest.approx(-1)
