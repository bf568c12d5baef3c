"""Ranges of activations: what plain numpy finds over all values, zero always on the grid."""

import numpy as np
import pytest

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.onnx_ranges import LEVELS, activation_ranges, grid

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BINS = 8192  # of the histogram that percentiles and errors are read from


def network():
    """doubled = 2 x, relu = max(doubled, 0), sum = relu + x: float32 of any length."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Relu", ["doubled"], ["relu"]),
        helper.make_node("Add", ["relu", "x"], ["sum"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "sum")]
    two = onnx.numpy_helper.from_array(np.float32(2), "two")
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def normal(count, seed=0, **outliers):
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    values[: len(outliers)] = list(outliers.values())
    return values


def squared_error(values, bounds):
    step, zero = (float(each) for each in grid(bounds))
    codes = np.clip(np.rint(values.astype(np.float64) / step) + zero, 0, LEVELS)
    return (((codes - zero) * step - values) ** 2).sum()


def twin(values):
    """Values of all tensors of the network, by numpy."""
    doubled = 2 * values
    relu = np.maximum(doubled, 0)
    return {"x": values, "doubled": doubled, "relu": relu, "sum": relu + values}


def test_minmax_is_the_smallest_and_the_largest_value_of_all_runs():
    runs = [normal(500, seed) for seed in range(3)]

    found = activation_ranges(network(), ["x", "doubled", "relu", "sum"], [{"x": run} for run in runs])

    for name, values in twin(np.concatenate(runs)).items():
        assert found[name] == (values.min(), values.max())


def test_a_range_always_holds_zero():
    above, below = np.linspace(1, 2, 9, dtype=np.float32), np.linspace(-2, -1, 9, dtype=np.float32)

    assert activation_ranges(network(), ["x"], [{"x": above}]) == {"x": (0.0, 2.0)}
    for ranges in ("minmax", "percentile", "mse"):
        low, high = activation_ranges(network(), ["x"], [{"x": below}], ranges=ranges)["x"]
        assert low < -1
        assert high == 0


def test_percentiles_are_those_of_numpy():
    runs = [normal(100_000, seed, low=-30.0, high=60.0) for seed in range(2)]

    found = activation_ranges(network(), ["doubled", "relu"], [{"x": run} for run in runs], ranges="percentile")

    expected = twin(np.concatenate(runs))
    for name in ("doubled", "relu"):
        values = expected[name]
        low, high = np.quantile(values, [0.00005, 0.99995])
        bin_width = float(values.max() - min(values.min(), 0)) / BINS
        assert found[name] == pytest.approx((min(low, 0), high), abs=4 * bin_width)
        assert found[name][1] < values.max() / 4


def test_the_range_of_least_squared_error_is_about_as_good_as_the_best_of_all():
    values = normal(100_000, high=7.0)

    bounds = activation_ranges(network(), ["x"], [{"x": values}], ranges="mse")["x"]

    shrinks = np.linspace(0.4, 1, 25)
    tried = [(values.min() * low, values.max() * high) for low in shrinks for high in shrinks]
    best = min(squared_error(values, each) for each in tried)
    assert squared_error(values, bounds) < 1.02 * best
    assert squared_error(values, bounds) < 0.9 * squared_error(values, (values.min(), values.max()))


def test_an_outlier_costs_less_where_it_is_cut_off():
    values = normal(1_000_000, high=10.0)

    error = {
        ranges: squared_error(values, activation_ranges(network(), ["x"], [{"x": values}], ranges=ranges)["x"])
        for ranges in ("minmax", "percentile", "mse")
    }

    assert error["percentile"] < 0.7 * error["minmax"]
    assert error["mse"] < error["percentile"]


@pytest.mark.parametrize(
    ("bounds", "step", "zero"),
    [
        ((0.0, 255.0), 1.0, 0),
        ((-255.0, 0.0), 1.0, 255),
        ((-51.0, 204.0), 1.0, 51),
        ((-1.0, 1.0), 2 / 255, 128),
        ((0.0, 0.0), 2.0**-20, 0),  # small: what is added after it is rounded to a multiple
    ],
)
def test_the_grid_of_a_range(bounds, step, zero):
    found = grid(bounds)

    assert found == (np.float32(step), zero)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.uint8)


def test_a_range_below_what_float32_divides_keeps_a_positive_step():
    step, _ = grid((0.0, 1e-44))

    assert step > 0
    assert np.isfinite(np.float32(1) / step)


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("values", [np.zeros(5, np.float32), np.zeros(0, np.float32)])
def test_values_that_are_all_zero_or_none_at_all_have_an_empty_range(ranges, values):
    assert activation_ranges(network(), ["x", "sum"], [{"x": values}], ranges=ranges) == {"x": (0, 0), "sum": (0, 0)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    feeds = [{"x": normal(5)}, {"x": np.array([1, bad], np.float32)}]

    with pytest.raises(ArtifactError, match=r"the values of 'doubled' are not all finite .* or leave activations=None"):
        activation_ranges(network(), ["doubled"], feeds)


def test_without_feeds_the_error_asks_for_one():
    with pytest.raises(ValueError, match="8-bit activations need calibration inputs, got none: pass at least one"):
        activation_ranges(network(), ["x"], [])


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"ranges must be one of \('minmax', 'percentile', 'mse'\), got 'entropy'"):
        activation_ranges(network(), ["x"], [{"x": normal(5)}], ranges="entropy")


def test_feeds_that_the_graph_does_not_take_are_refused():
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot run the graph on the calibration inputs: .*rank"):
        activation_ranges(network(), ["sum"], [{"x": np.zeros((2, 2), np.float32)}])


def test_the_graph_is_left_as_it_was():
    proto = network()
    before = proto.SerializeToString(deterministic=True)

    activation_ranges(proto, ["doubled"], [{"x": normal(5)}])

    assert proto.SerializeToString(deterministic=True) == before
