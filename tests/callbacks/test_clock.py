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
    ],
)
def test_impossible_moments_are_refused(moment, text):
    with pytest.raises(ValueError, match=text):
        check_moment("warmup", moment)


def test_without_a_known_epoch_only_shares_name_batches():
    clock = Clock(batches=40, epoch_batches=None)

    assert clock.batch_of(0.25) == 10
    assert clock.label(10) == "25% of the fit"
    with pytest.raises(ValueError, match=r"phases are given in epochs \(3\), but the training data has no length"):
        clock.batch_of(3)
