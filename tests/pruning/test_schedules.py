"""Ramps, by numbers worked out by hand."""

import pytest

from lightning_xai_compress.pruning import cubic, linear, one_shot, ramp, stepwise


def test_the_ramp_is_cubic():
    assert cubic(0.0, final=0.8) == 0.0
    assert cubic(0.5, final=0.8) == pytest.approx(0.7)  # 0.8 * (1 - 0.125)
    assert cubic(1.0, final=0.8) == pytest.approx(0.8)


def test_linear_rises_as_much_at_every_step():
    assert [linear(step / 4, final=0.8) for step in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_one_shot_is_there_at_once():
    assert [one_shot(progress, final=0.8) for progress in (0.0, 0.1, 1.0)] == [0.0, 0.8, 0.8]


def test_stepwise_takes_its_levels_one_after_the_other():
    levels = (0.2, 0.5, 0.7, 0.75, 0.8, 0.9)

    found = [stepwise(step / 6, final=0.9, levels=levels) for step in range(7)]

    assert found == pytest.approx([0.0, *levels])
    assert stepwise(2 / 3, final=0.6, levels=(0.2, 0.4, 0.8)) == pytest.approx(0.3)  # in proportion


@pytest.mark.parametrize(("name", "function"), [("one_shot", one_shot), ("linear", linear), ("cubic", cubic)])
def test_ramps_go_by_their_names(name, function):
    assert ramp(name)(0.25, final=0.8) == function(0.25, final=0.8)


def test_the_ramp_of_steps_knows_its_levels():
    assert ramp("stepwise", (0.3, 0.6))(0.5, final=0.6) == 0.3
