"""Ways of training: no pruned weight ever moves, values stay on their grids, and the training itself is undisturbed."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision as PrecisionPlugin
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import LatentCopyError, Scoring, load_compressed

from toy import Corners, EpochSampler, ToyNet, compression, fit, watch_scores


class Watch(L.Callback):
    """After every batch: masked weights are exactly zero, quantized ones on their grid."""

    def __init__(self, compression):
        self.compression = compression
        self.norms = []
        self.checked = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        latent = self.compression.session.latent
        for name, parameter in latent.parameters.items():
            if name in latent.keep:
                assert (parameter[~latent.keep[name]] == 0).all()
            if name in latent.bits:
                codes = parameter.float().flatten(1) / latent.scales[name].clamp(min=1e-30).unsqueeze(1)
                limit = (2.0 ** (latent.bits[name].float() - 1) - 1).unsqueeze(1)
                tolerance = (
                    1e-3 if parameter.dtype == torch.float32 else 0.26
                )  # bfloat16 rounds the value itself, by 2^-9 of it
                assert ((codes - codes.round()).abs() <= tolerance).all()
                assert (codes.round().abs() <= limit).all()
                self.checked += 1


class TwoOptimizers(ToyNet):
    """Manual optimization, one optimizer for the convolutions and one for the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        body = [*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()]
        return [torch.optim.SGD(body, 0.05), torch.optim.AdamW(self.head.parameters(), 0.01)]


class Fused(ToyNet):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, fused=True, weight_decay=0.1)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (ToyNet, {}),
        (ToyNet, {"accumulate_grad_batches": 2}),
        (ToyNet, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (ToyNet, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (ToyNet, {"precision": "bf16-mixed"}),
        (ToyNet, {"precision": "bf16-true"}),
        (ToyNet, {"max_epochs": -1, "max_steps": 24}),
        (ToyNet, {"limit_train_batches": 2}),
        (ToyNet, {"limit_val_batches": 0}),
        (ToyNet, {"val_check_interval": 0.5}),
        (ToyNet, {"overfit_batches": 2}),
        (Fused, {}),
        (TwoOptimizers, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value)) or "plain",
)
def test_pruned_weights_never_move_and_the_export_is_exact(tmp_path, model, settings):
    callback = compression(tmp_path)
    watch = Watch(callback)

    trained, _ = fit(tmp_path, [callback, watch], model(), **settings)

    assert callback.report.sparsity == 0.5
    assert 2.8 < callback.report.average_bits <= 3.0
    assert watch.checked
    empty = model().to(next(trained.parameters()).dtype)
    reloaded = load_compressed(tmp_path / "model.safetensors", empty)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def test_a_gradient_scaler_that_skips_steps_leaves_compressed_weights(tmp_path):
    """The scale starts so high that the first steps overflow and are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=10_000)
    callback = compression(tmp_path, warmup=0.0, pruning_end=0.1)
    watch = Watch(callback)
    skipped = []

    class Count(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            skipped.append(not torch.isfinite(pl_module.head.weight.grad).all())

    fit(tmp_path, [callback, watch, Count()], plugins=[PrecisionPlugin("16-mixed", "cpu", scaler)])

    assert sum(skipped) >= 1
    assert not all(skipped)
    assert watch.checked > 0
    assert callback.report.halted == ""
    assert callback.report.artifacts[0].max_abs_diff == 0


def test_stepping_around_lightning_is_refused_at_the_first_step(tmp_path):
    class Raw(ToyNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with pytest.raises(LatentCopyError, match=r"call self.optimizers\(\).step\(\)"):
        fit(tmp_path, [compression(tmp_path)], Raw())


def test_the_clip_norm_ignores_pruned_weights(tmp_path):
    callback = compression(tmp_path, warmup=0.0, pruning_end=0.1, sparsity=0.9)
    seen = []

    class Norms(ToyNet):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            latent = callback.session.latent
            seen.append(max(float(p.grad[~latent.keep[n]].abs().sum()) for n, p in latent.parameters.items()))

    fit(tmp_path, [callback], Norms(), gradient_clip_val=1.0)

    assert len(seen) == 32
    assert max(seen) == 0.0


class Batches(ToyNet):
    def __init__(self):
        super().__init__()
        self.seen, self.noise = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum())
        self.noise.append(torch.rand(1))
        return super().training_step(batch, batch_idx)


class Shuffled(Corners):
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16, shuffle=True)


@pytest.mark.parametrize("data", [Corners, Shuffled])
def test_batches_and_random_numbers_are_those_of_a_run_without_the_callback(tmp_path, data):
    plain, _ = fit(tmp_path, [], Batches, data())
    ours, _ = fit(tmp_path, [compression(tmp_path)], Batches, data())

    assert torch.equal(torch.stack(plain.seen), torch.stack(ours.seen))
    assert torch.equal(torch.stack(plain.noise), torch.stack(ours.noise))
    assert plain.losses[:8] == ours.losses[:8]  # warm-up changes nothing
    assert plain.losses[9:] != ours.losses[9:]


def test_calibration_batches_go_through_the_users_batch_hooks(tmp_path):
    class Hooked(ToyNet):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls.append("before")
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls.append(("after", bool(self.trainer.training)))
            return batch[0] - 1, batch[1]

        def relevance_step(self, batch, batch_idx):
            doubled = 2 * torch.stack([x for x, _ in Corners().data]) - 1
            assert all((doubled == image).flatten(1).all(1).any() for image in batch[0])
            return self(batch[0]).gather(1, batch[1].unsqueeze(1))

    plain, _ = fit(tmp_path, [], Hooked())
    ours, _ = fit(tmp_path, [compression(tmp_path)], Hooked())

    assert len(ours.calls) > len(plain.calls)


def test_a_custom_batch_sampler_and_collate_are_used(tmp_path, monkeypatch):
    class Custom(Corners):
        def train_dataloader(self):
            sampler = torch.utils.data.BatchSampler(EpochSampler(len(self.data)), 8, drop_last=False)

            def collate(samples):
                return [torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])]

            return DataLoader(self.data, batch_sampler=sampler, collate_fn=collate)

    scores = watch_scores(monkeypatch)
    callback = compression(tmp_path)
    fit(tmp_path, [callback], data=Custom())

    assert {each.samples for each in scores} == {32}
    assert callback.report.sparsity == 0.5


@pytest.mark.parametrize("epochs", [1, 8])
def test_frozen_batchnorm_keeps_its_statistics(tmp_path, epochs):
    """Frozen as late as the module's own hook for the start of an epoch, which comes after those of callbacks."""

    class Frozen(ToyNet):
        def on_train_epoch_start(self):
            self.norm.eval()

    model, _ = fit(tmp_path, [compression(tmp_path)], Frozen(), max_epochs=epochs)

    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert int(model.norm.num_batches_tracked) == 0


def test_calibration_draws_only_what_the_sampler_gives(tmp_path):
    class Split(Corners):
        def train_dataloader(self):
            self.read = []

            def collate(samples):
                self.read += [float(x.sum()) for x, _ in samples]
                return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])

            sampler = torch.utils.data.SubsetRandomSampler(range(48))
            return DataLoader(self.data, batch_size=16, sampler=sampler, collate_fn=collate)

    data = Split()
    fit(tmp_path, [compression(tmp_path)], data=data)

    held_out = {float(x.sum()) for x, _ in list(data.data)[48:]}
    assert data.read
    assert not held_out & set(data.read)


@pytest.mark.parametrize("kind", ["drop last", "own batch sampler", "whole batches"])
def test_calibration_batches_are_like_the_training_ones(tmp_path, kind, monkeypatch):
    """With one sample too many, a ragged batch of one would be too small for BatchNorm on vectors."""
    sizes = []

    class Ragged(Corners):
        def train_dataloader(self):
            if kind == "drop last":
                return DataLoader(self.data, batch_size=16, drop_last=True)
            if kind == "whole batches":
                x, y = self.data.tensors
                batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
                return DataLoader(batches, batch_size=None)

            class Own(torch.utils.data.Sampler):
                def __len__(self):
                    return 4

                def __iter__(self):
                    return iter([list(range(i, i + 16)) for i in range(0, 64, 16)])

            return DataLoader(self.data, batch_sampler=Own())

    class Vectors(ToyNet):
        def __init__(self):
            super().__init__()
            self.flat = torch.nn.BatchNorm1d(32)

        def forward(self, x):
            sizes.append(len(x))
            x = F.relu(self.norm(self.first(x)))
            x = F.avg_pool2d(F.relu(self.second(x)), 3)
            return self.head(self.flat(x.flatten(1)))

    scores = watch_scores(monkeypatch)
    callback = compression(tmp_path, scoring=Scoring(samples=20))
    fit(tmp_path, [callback], Vectors, data=Ragged(65), limit_val_batches=0)

    assert {each.samples for each in scores} == {32}  # whole batches of 16
    assert set(sizes) == {16}
    assert callback.report.sparsity == 0.5


def test_measuring_a_metric_leaves_the_training_order_alone(tmp_path):
    plain, _ = fit(tmp_path, [], Batches, Shuffled())
    ours, _ = fit(tmp_path, [compression(tmp_path, metric=MulticlassAccuracy(4))], Batches, Shuffled())

    assert torch.equal(torch.stack(plain.seen), torch.stack(ours.seen))


def test_fast_dev_run_goes_through_everything_and_leaves_an_earlier_export_alone(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"earlier")
    callback = compression(tmp_path)

    fit(tmp_path, [callback], fast_dev_run=True)

    assert callback.report.sparsity == 0.5
    assert callback.report.average_bits > 2.8
    assert callback.report.artifacts[0].max_abs_diff == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"earlier"


def test_a_compiled_inner_module_is_scored_without_being_compiled_again(tmp_path):
    class Compiled(ToyNet):
        def __init__(self):
            super().__init__()
            self.second.compile(backend="eager")

    torch._dynamo.reset()
    model, _ = fit(tmp_path / "compiled", [compression(tmp_path / "compiled")], Compiled)
    plain, _ = fit(tmp_path / "plain", [compression(tmp_path / "plain")])

    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
