"""What a training step carries beyond that of a fit without the callback."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_xai_compress import BitAllocation, Mask, RelevanceScoring, Scoring
from lightning_xai_compress.callbacks.latent import LatentCopy

from toy import compression, fit


class Watch(L.Callback):
    """Whether scores are there at each optimizer step."""

    def __init__(self, ours):
        self.ours, self.seen = ours, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(self.ours.session.scores is not None)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda folder: compression(folder), False),
        (lambda folder: compression(folder, relevance_epochs=2), True),
        (lambda folder: RelevanceScoring(scoring=Scoring(samples=32)), True),
    ],
    ids=["scored at use", "scored for later", "scoring alone"],
)
def test_scores_are_there_in_a_step_only_where_they_wait_for_a_use(tmp_path, make, held):
    ours = make(tmp_path)
    watch = Watch(ours)
    fit(tmp_path, [ours, watch])

    assert watch.seen == [held] * 32
    assert any(event["event"] in ("pruned", "scored") for event in ours.session.history)


def test_masks_latents_and_grids_are_one_copy_of_the_weights_and_less_than_a_byte_a_weight():
    weight = nn.Parameter(torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0)))
    latent = LatentCopy({"weight": weight})
    latent.apply_mask(Mask({"weight": weight.detach() > 0}))
    bits = torch.full((64,), 4, dtype=torch.uint8)
    latent.apply_bits(BitAllocation({"weight": bits}, {"weight": 288}), {"weight": torch.full((64,), 0.25)})

    held = [*latent._latents.values(), *latent.keep._packed.values(), *latent.bits.values(), *latent.scales.values()]
    copies = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}

    assert 4 < sum(copies.values()) / weight.numel() < 5
