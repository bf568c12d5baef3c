"""How patiently a fit prunes, and what stays, by the settings of `Pruning`."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_xai_compress import Pruning, RelevancePruning, RelevanceScoring, Scoring
from lightning_xai_compress.callbacks.scorer import Scorer
from lightning_xai_compress.pruning import nonpositive_share

from toy import Corners, TiedNet, ToyNet, compression, fit, watch_scores


def pruned(callback):
    """Epoch and sparsity of each pruning step."""
    return [(each["epoch"], each["sparsity"]) for each in callback.session.history if each["event"] == "pruned"]


def prune(folder, model=ToyNet, callbacks=(), sparsity=0.5, **settings):
    """A fit that only prunes, by magnitude (steps at batches 8, 9, 11, 13, 15 and 17 of 32, if there are six)."""
    callback = RelevancePruning(sparsity=sparsity, pruning=Pruning(**settings))
    scoring = RelevanceScoring(criterion="magnitude")
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    model, _ = fit(folder, [callback, scoring, *callbacks], model, enable_checkpointing=saves)
    return model, callback


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("cubic", [0.6 * (1 - (1 - step / 6) ** 3) for step in range(1, 7)]),
        ("one_shot", [0.6]),
    ],
)
def test_a_fit_prunes_along_its_schedule(tmp_path, schedule, expected):
    _, callback = prune(tmp_path, sparsity=0.6, schedule=schedule, steps=6)

    assert [sparsity for _, sparsity in pruned(callback)] == pytest.approx(expected, abs=1 / 776)
    assert pruned(callback)[0][0] == 2.0


def test_milestones_are_epochs_shares_or_steps(tmp_path, capsys):
    milestones = [(2, 0.2), ("11 steps", 0.3), (0.5, 0.7)]

    _, callback = prune(tmp_path, sparsity=0.7, schedule="stepwise", milestones=milestones)

    assert pruned(callback) == [(2.0, 155 / 776), (2.75, 233 / 776), (4.0, 543 / 776)]
    table = capsys.readouterr().out
    assert all(percent in table for percent in ("20.0%", "30.0%", "70.0%"))


def test_without_a_sparsity_milestones_are_proportions_of_what_is_found(tmp_path, monkeypatch):
    found = watch_scores(monkeypatch)
    callback = RelevancePruning(pruning=Pruning(schedule="stepwise", milestones=[(2, 0.2), (4, 0.8)]))

    fit(tmp_path, [callback, RelevanceScoring(scoring=Scoring(samples=32))])

    share = nonpositive_share(found[0])
    first, last = pruned(callback)
    assert first[1] == pytest.approx(share / 4, abs=1 / 776)
    assert share / 4 < last[1] <= share  # the set may have shrunk
    assert callback.positives == 0


@pytest.mark.parametrize(("every", "passes"), [(1, 6), (2, 3), (4, 2), (6, 1), (9, 1)])
def test_only_every_nth_step_scores_anew(tmp_path, monkeypatch, every, passes):
    found = watch_scores(monkeypatch)

    _, callback = prune(tmp_path, steps=6, rescore_every=every)

    assert len(found) == passes
    assert len(pruned(callback)) == 6
    assert callback.session.scores is None  # let go after the last step


def test_steps_between_go_by_the_latest_scores(tmp_path, monkeypatch):
    found = watch_scores(monkeypatch)

    _, callback = prune(tmp_path, ToyNet(lr=0.1), steps=6, rescore_every=6)

    score = torch.cat([found[0].score[name].flatten() for name in sorted(found[0].score)])
    keep = torch.cat([callback.session.latent.mask()[name].flatten() for name in sorted(found[0].score)])
    assert torch.equal((~keep).nonzero().flatten(), score.argsort()[:388].sort().values)


@pytest.mark.parametrize("settings", [{"rescore_every": 4}, {"confidence": 0.8}], ids=["rescore_every", "confidence"])
def test_a_resumed_fit_goes_by_the_scores_of_the_uninterrupted_one(tmp_path, settings):
    """After epoch 3 two more steps are due, by scores of before; at a constant width nothing else needs them."""

    def stages():
        epochs = [2] if "confidence" in settings else None
        scoring = Scoring(samples=64, statistics=("rms", "standard_error"))
        return [
            RelevanceScoring(relevance_epochs=epochs, scoring=scoring),
            RelevancePruning(sparsity=0.5, selection="nonpositive", pruning=Pruning(steps=6, **settings)),
        ]

    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    data = Corners(batch_size=8)
    whole, _ = fit(tmp_path, [*stages(), saver], data=data, enable_checkpointing=True)
    for epoch in (2, 3):
        path = tmp_path / "ckpt" / f"epoch={epoch}.ckpt"
        (state,) = (each for each in torch.load(path)["callbacks"].values() if "latent" in each)
        assert set(state["scores"]["score"]) == {"first.weight", "second.weight", "head.weight"}
        resumed, _ = fit(tmp_path, stages(), data=data, ckpt_path=str(path))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
    (state,) = (
        each for each in torch.load(tmp_path / "ckpt" / "epoch=6.ckpt")["callbacks"].values() if "latent" in each
    )
    assert ("scores" in state) == ("confidence" in settings)


def test_protected_layers_are_quantized_but_not_pruned_and_count_in_the_sparsity(tmp_path):
    callback = compression(tmp_path, pruning=Pruning(steps=6, protect=["first", "head.*"]))

    model, _ = fit(tmp_path, [callback])

    plan = callback.session.latent.plan()
    assert plan.mask["first.weight"].all()
    assert plan.mask["head.weight"].all()
    assert plan.mask["second.weight"].sum() == 576 - 388
    assert set(plan.allocation.bits) == {"first.weight", "second.weight", "head.weight"}
    for row, bits in zip(model.head.weight.detach(), plan.allocation["head.weight"].tolist(), strict=True):
        assert len(row.unique()) <= 2**bits - 1


class Backwards(ToyNet):
    """Registers its layers in another order than it calls them; the head is a functional call."""

    def __init__(self):
        super().__init__()
        self.first, self.head = self._modules.pop("first"), self._modules.pop("head")

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.first(x)))
        x = nn.functional.avg_pool2d(nn.functional.relu(self.second(x)), 3)
        return nn.functional.linear(x.flatten(1), self.head.weight, self.head.bias)


@pytest.mark.parametrize("model", [ToyNet, Backwards])
def test_the_ends_are_those_that_a_batch_meets_first_and_last(tmp_path, model):
    _, callback = prune(tmp_path, model, steps=2, protect_ends=True)

    assert callback.choice.protect == ("first.weight", "head.weight")
    assert callback.choice.outputs == {"head.weight": 0}
    mask = callback.session.latent.mask()
    assert mask["first.weight"].all()
    assert mask["head.weight"].all()


def test_a_model_that_cannot_be_run_by_a_batch_has_the_ends_that_are_registered(tmp_path):
    class Closed(ToyNet):
        def forward(self, x, really=False):
            assert really
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], really=True), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    class NoNorm(Closed):
        def __init__(self):
            super().__init__()
            self.norm = nn.Identity()
            self.second, self.head = self._modules.pop("second"), self._modules.pop("head")

    _, callback = prune(tmp_path, NoNorm, steps=2, protect_ends=True)

    assert callback.choice.protect == ("first.weight", "head.weight")


def test_outputs_of_a_transposed_convolution_are_counted_along_its_second_axis(tmp_path):
    class Decoder(ToyNet):
        def __init__(self):
            super().__init__()
            self.head = nn.ConvTranspose2d(8, 4, 2)

        def forward(self, x):
            x = nn.functional.relu(self.second(nn.functional.relu(self.norm(self.first(x)))))
            return self.head(x).mean((2, 3))

    model, callback = prune(tmp_path, Decoder, sparsity=0.98, steps=2)

    assert callback.choice.outputs == {"head.weight": 1}
    assert (model.head.weight != 0).any(0).flatten(1).any(1).all()


def test_a_tied_layer_is_protected_under_any_of_its_names(tmp_path):
    _, callback = prune(tmp_path, TiedNet, sparsity=0.1, steps=2, protect=["third"])

    assert callback.choice.protect == ("second.weight",)


@pytest.mark.parametrize("selection", ["least", "nonpositive"])
def test_at_the_highest_sparsity_every_layer_and_every_output_is_alive(tmp_path, selection):
    callback = compression(tmp_path, sparsity=770 / 776, selection=selection)

    fit(tmp_path, [callback])

    mask = callback.session.latent.mask()
    assert {name: int(keep.sum()) for name, keep in mask.keep.items()} == {
        "first.weight": 1, "second.weight": 1, "head.weight": 4,
    }  # fmt: skip
    assert mask["head.weight"].sum(1).tolist() == [1, 1, 1, 1]


def test_layers_end_at_the_same_sparsity_where_that_is_asked_for(tmp_path):
    _, callback = prune(tmp_path, sparsity=0.75, steps=6, scope="layer")

    assert {name: int((~keep).sum()) for name, keep in callback.session.latent.mask().keep.items()} == {
        "first.weight": 54, "second.weight": 432, "head.weight": 96,
    }  # fmt: skip


def test_a_floor_and_a_normalization_reach_the_masks(tmp_path):
    masks = [
        prune(tmp_path, sparsity=0.7, steps=1, **settings)[1].session.latent.mask()
        for settings in ({}, {"floor": 0.25}, {"normalization": "lamp"})
    ]

    assert all(int(keep.sum()) >= keep.numel() / 4 for keep in masks[1].keep.values())
    assert int(masks[0]["second.weight"].sum()) < 144  # a quarter
    kept = [{name: int(keep.sum()) for name, keep in mask.keep.items()} for mask in masks]
    assert kept[0] != kept[2]


def test_literal_prunes_the_nonpositive_set_at_once_and_warns_before_training(tmp_path, monkeypatch):
    found = watch_scores(monkeypatch)
    callback = compression(tmp_path, sparsity=None, selection="literal", pruning=None)

    with pytest.warns(UserWarning, match="selection='literal' prunes every weight .* worse than after random"):
        fit(tmp_path, [callback])

    (step,) = pruned(callback)
    assert step[0] == 2.0
    mask, nonpositive = callback.session.latent.mask(), found[0].nonpositive()
    for name in ("first.weight", "second.weight"):
        assert torch.equal(mask[name], ~nonpositive[name])
    rescued = mask["head.weight"] & nonpositive["head.weight"]
    assert not rescued.any()
    assert callback.report.positive_pruned == 0


class Rate(Callback):
    """Sets the learning rate of each epoch."""

    def __init__(self, *rates):
        self.rates = rates

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = self.rates[trainer.current_epoch]


def test_a_learning_rate_that_is_spent_at_the_last_step_is_warned_of(tmp_path):
    rates = Rate(0.05, 0.1, 0.05, 0.01, 0.0009, 0.0, 0.0, 0.0)

    with pytest.warns(
        UserWarning, match=re.escape("(epoch 4.25) the learning rate has decayed to 0.0009, below 1% of")
    ):
        prune(tmp_path, callbacks=[rates], steps=6)


@pytest.mark.filterwarnings("error:at the last pruning step")
def test_a_learning_rate_that_falls_after_the_last_step_is_not_warned_of(tmp_path):
    prune(tmp_path, callbacks=[Rate(0.05, 0.1, 0.05, 0.01, 0.0011, 0.0, 0.0, 0.0)], steps=6)


def test_the_peak_of_the_learning_rate_outlives_a_resume(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    prune(tmp_path, callbacks=[Rate(*[0.1] * 8), saver], steps=6)
    stages = [RelevancePruning(sparsity=0.5, selection="least", pruning=Pruning(steps=6)), Rate(*[0.0009] * 8)]

    with pytest.warns(UserWarning, match="at the last pruning step"):
        fit(tmp_path, [*stages, RelevanceScoring(criterion="magnitude")], ckpt_path=str(tmp_path / "epoch=3.ckpt"))


class Statistics(Callback):
    """What BatchNorm shows while scores are made, and after it."""

    def __init__(self, monkeypatch):
        self.seen, scored = [], Scorer.training_samples

        def watched(scorer, batch, **settings):
            module = scorer._module
            x = torch.stack([image for image, _ in Corners().data])
            self.seen.append((module.norm.running_mean.clone(), module.first(x).detach().mean((0, 2, 3))))
            return scored(scorer, batch, **settings)

        monkeypatch.setattr(Scorer, "training_samples", watched)


def test_scores_see_fresh_statistics_where_that_is_asked_for_and_training_does_not(tmp_path, monkeypatch):
    ends, distances = [], []
    for fresh in (False, True):
        statistics = Statistics(monkeypatch)
        model, _ = prune(tmp_path, steps=6, fresh_batchnorm=fresh)
        ends.append(model.state_dict())
        distances.append(max(float((shown - true).abs().max()) for shown, true in statistics.seen))
        assert len(statistics.seen) == 6
        monkeypatch.undo()

    assert distances[0] > 1e-2
    assert distances[1] < 1e-5
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # magnitude does not look at statistics
