"""Moments of a fit in batches."""

import pytest

from lightning_xai_compress.callbacks.clock import Clock, check_moment


def test_shares_and_epochs_name_batches():
    clock = Clock(batches=120, epoch_batches=10)

    assert (clock.batch_of(0.25), clock.batch_of(0.6), clock.batch_of(3), clock.batch_of(0)) == (30, 72, 30, 0)
    assert clock.epoch_of(120) == 12
    assert clock.epoch_of(72) == 7.2


def test_shares_count_from_where_compression_began():
    clock = Clock(batches=120, epoch_batches=10, start=20)

    assert clock.batch_of(0.25) == 45
    assert clock.batch_of(3) == 30
    assert clock.batch_of(1) == 20


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_shares_are_not_moved_by_rounding(share):
    assert Clock(batches=1000, epoch_batches=10).batch_of(share) == round(1000 * share)


def test_the_end_of_the_fit_is_past_it():
    with pytest.raises(ValueError, match="warmup=12 lies past the end of the fit, which has 12 epochs"):
        Clock(batches=120, epoch_batches=10).check("warmup", 12)


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (1.0, r"a share of the fit must lie in \[0, 1\)"),
        (-0.1, "share"),
        (-1, "negative"),
        (True, "must be a number, got True"),
        ("soon", r"warmup as a text must be a whole number of steps or epochs, such as '1500 steps'.*got 'soon'"),
        ("1.5 steps", "whole number of steps or epochs"),
        ("-3 steps", "whole number of steps or epochs"),
        ("30 %", "whole number of steps or epochs"),
        ("3", "a plain number is written without quotes"),
        ("", "whole number of steps or epochs"),
    ],
)
def test_impossible_moments_are_refused(moment, text):
    with pytest.raises(ValueError, match=text):
        check_moment("warmup", moment)


def test_without_a_known_epoch_only_shares_name_batches():
    clock = Clock(batches=40, epoch_batches=None)

    assert clock.batch_of(0.25) == 10
    assert clock.label(10) == "25% of the fit"
    assert clock.batch_of("12 steps") == 12
    with pytest.raises(ValueError, match=r"phases are given in epochs \(3\), but the training data has no length"):
        clock.batch_of(3)
    with pytest.raises(ValueError, match="warmup=40 steps lies past the end of the fit, which has 40 steps"):
        clock.check("warmup", "40 steps")


@pytest.mark.parametrize(
    ("text", "moment"),
    [("1500 steps", "1500 steps"), ("1 step", "1 step"), ("3 epochs", 3), (" 1epoch ", 1), ("0 epochs", 0)],
)
def test_texts_are_steps_or_epochs(text, moment):
    assert check_moment("warmup", text) == moment


def steps_of_a_fit(epoch_batches, accumulation, batches):
    """The step count before each batch, counted one by one."""
    steps, counted = 0, []
    for batch in range(batches):
        counted.append(steps)
        epoch, index = divmod(batch, epoch_batches)
        window = [factor for first, factor in accumulation if first <= epoch][-1]
        steps += (index + 1) % window == 0 or index + 1 == epoch_batches
    return [*counted, steps]


@pytest.mark.parametrize("epoch_batches", [1, 4, 5])
@pytest.mark.parametrize("accumulation", [((0, 1),), ((0, 3),), ((0, 1), (2, 4)), ((0, 4), (1, 2), (3, 1))])
def test_a_step_is_taken_at_the_batch_at_which_so_many_steps_are_over(epoch_batches, accumulation):
    batches = 6 * epoch_batches
    clock = Clock(batches, epoch_batches, accumulation=accumulation)
    counted = steps_of_a_fit(epoch_batches, accumulation, batches)

    for step in range(counted[-1] + 1):
        assert clock.batch_of_step(step) == counted.index(step)
    assert clock.steps == counted[-1]


def test_steps_count_from_the_fits_first_one_and_not_before_compression_began():
    clock = Clock(batches=120, epoch_batches=10, start=20)

    assert clock.batch_of("45 steps") == 45
    assert clock.batch_of("5 steps") == 20
    assert clock.batch_of("0 steps") == 20


def test_optimizers_that_step_by_hand_count_each():
    clock = Clock(batches=40, epoch_batches=10, steps_a_batch=2)

    assert clock.batch_of("24 steps") == 12
    assert clock.steps == 80


def test_steps_past_the_end_are_refused_with_the_number_of_steps():
    clock = Clock(batches=10, epoch_batches=5, accumulation=((0, 2),))

    with pytest.raises(ValueError, match="warmup=6 steps lies past the end of the fit, which has 6 steps"):
        clock.check("warmup", "6 steps")
    assert clock.check("end of pruning", "6 steps", last=True) == 10
    with pytest.raises(ValueError, match="end of pruning=7 steps lies past the end"):
        clock.check("end of pruning", "7 steps", last=True)


def test_a_rehearsal_puts_what_lies_behind_its_end_at_its_last_batch():
    clock = Clock(batches=3, epoch_batches=3, rehearsal=True)

    assert [clock.batch_of(moment) for moment in (0, 0.5, 7, "2 steps", "900 steps")] == [0, 1, 2, 2, 2]
