"""Models that went through torch.compile before the fit: equal to eager, and no graph more than the training needs."""

import shutil

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_xai_compress import ArtifactError, BitAllocation, Mask, Pruning, Quantization, load_compressed
from lightning_xai_compress.callbacks.latent import LatentCopy
from lightning_xai_compress.quantization import fit_scales

from toy import Corners, ToyNet, compression, fit, trainer

WAYS = [pytest.param("whole", marks=pytest.mark.slow), "inner", "wrapped"]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(ToyNet):
    """Without the list of losses, whose length would need a graph a step."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_size", logits.square().mean())


class Graphs:
    """A backend that counts what it compiles."""

    def __init__(self, backend="eager"):
        self.made = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.made += 1
        return self.backend(graph, inputs)


class Watch(L.Callback):
    """The module's own metrics, and the number of graphs, at the end of every epoch."""

    def __init__(self, graphs=None):
        self.graphs, self.metrics, self.made = graphs, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.made.append(self.graphs.made if self.graphs is not None else 0)


def compiled(way, backend):
    """A seeded net, and what is given to fit."""
    torch.manual_seed(0)
    net = Net()
    if way == "whole":
        return net, torch.compile(net, backend=backend)
    if way == "inner":
        net.second.compile(backend=backend)
    else:
        net.second = torch.compile(net.second, backend=backend)
    return net, net


def run(folder, way=None, *, backend="eager", plugin=True, activations=None, **settings):
    """One fit; returns the net, its state under plain names, the watch and the callback."""
    torch.manual_seed(0)
    graphs = Graphs(backend)
    net, given = compiled(way, graphs) if way else (Net(), None)
    watch = Watch(graphs)
    callback = compression(folder, quantization=Quantization(activations=activations), pruning=Pruning(steps=8))
    torch.manual_seed(0)
    fitted = trainer(folder, [callback, watch] if plugin else [watch], **settings)
    fitted.fit(net if given is None else given, datamodule=Corners())
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in net.state_dict().items()}
    return net, state, watch, callback


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_fit_equals_the_eager_one_and_needs_no_more_graphs(tmp_path, way, activations):
    """Masks change eight times, then bits and scales; ranges of 8-bit activations change at every epoch, too."""
    _, expected, eager, plain = run(tmp_path / "eager", activations=activations)
    net, got, watch, callback = run(tmp_path / "ours", way, activations=activations)
    images = Corners().data.tensors[0]
    output = net.eval()(images)

    assert len([event for event in plain.report.history if event["event"] == "pruned"]) >= 6
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert watch.metrics == eager.metrics  # of training and of validation
    assert callback.report.history == plain.report.history
    twin = Net()
    twin.load_state_dict(got)
    assert torch.equal(twin.eval()(images), output)  # nothing of the fit is left in graphs

    torch.compiler.reset()
    _, _, without, _ = run(tmp_path / "without", way, plugin=False)
    if activations is None:
        assert watch.made == without.made
    else:  # once more when layers begin to be watched, and once more when they begin to round
        assert watch.made[-1] <= 3 * without.made[-1]
        assert len(set(watch.made[5:])) == 1  # bits come at 4.75, ranges anew at 5, 6 and 7


@pytest.mark.parametrize("way", WAYS)
def test_aot_autograd_equals_eager(tmp_path, way):
    _, expected, _, _ = run(tmp_path / "eager", activations="int8")
    _, got, _, _ = run(tmp_path / "ours", way, backend="aot_eager", activations="int8")

    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("way", ["whole", "inner"])
def test_inductor_computes_what_eager_does_within_rounding(tmp_path, way, activations):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is none")
    _, _, eager, plain = run(tmp_path / "eager", activations=activations)
    net, got, watch, callback = run(tmp_path / "ours", way, backend="inductor", activations=activations)
    images = Corners().data.tensors[0]

    # warm-up and first mask; a weight in the middle of two codes may fall to either side later
    assert watch.metrics[1] == pytest.approx(eager.metrics[1], rel=1e-4)
    assert callback.report.sparsity == plain.report.sparsity == 0.5
    assert callback.report.average_bits == pytest.approx(plain.report.average_bits, abs=0.1)
    assert watch.metrics[-1]["val_loss"] == pytest.approx(eager.metrics[-1]["val_loss"], abs=0.1)
    twin = Net()
    twin.load_state_dict(got)
    torch.testing.assert_close(net.eval()(images), twin.eval()(images), rtol=1e-4, atol=1e-5)
    assert len(set(watch.made[5:])) == 1
    assert callback.report.artifacts[0].max_abs_diff == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_ten_changes_of_masks_and_bits(backend):
    torch.manual_seed(0)
    layer, graphs = nn.Linear(12, 4), Graphs(backend)
    fast = torch.compile(layer, backend=graphs, fullgraph=True)
    latent = LatentCopy({"weight": layer.weight})
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    latent.attach([optimizer])
    seen = []
    for change in range(10):
        latent.apply_mask(Mask({"weight": torch.rand(4, 12) > change / 12}))
        bits = torch.randint(2, 9, (4,)).to(torch.uint8)
        scales = torch.stack([fit_scales(layer.weight.detach(), int(each))[0][row] for row, each in enumerate(bits)])
        latent.apply_bits(BitAllocation({"weight": bits}, {"weight": 12}), {"weight": scales})
        x = torch.randn(5, 12)
        output = fast(x)
        assert torch.equal(output, F.linear(x, layer.weight, layer.bias))
        seen.append(output.detach())
        optimizer.zero_grad()
        output.square().sum().backward()
        latent.before_step(optimizer)
        optimizer.step()

    assert graphs.made == 1
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("way", ["inner", "wrapped"])
def test_hooks_reach_graphs_that_were_compiled_before_and_leave_them_afterwards(tmp_path, way):
    """The sanity validation compiles the evaluation before 8-bit activations begin to watch the layers."""
    validated = {}

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                validated[trainer.current_epoch] = trainer.callback_metrics["val_size"].clone()

    torch.manual_seed(0)
    net, given = compiled(way, "eager")
    callback = compression(tmp_path, quantization=Quantization(activations="int8"))
    trainer(tmp_path, [callback, Look()], num_sanity_val_steps=2).fit(given, datamodule=Corners())

    images = Corners().data.tensors[0]
    twin = Net()
    twin.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in net.state_dict().items()})
    with torch.no_grad():
        floats = twin.eval()(images)
        assert torch.equal(net.eval()(images), floats)
    floats = float(floats.square().mean())
    assert validated[7] != pytest.approx(floats, rel=1e-5)  # rounded activations, in the last validation
    assert validated[7] == pytest.approx(floats, rel=0.05)


@pytest.mark.slow
def test_a_module_compiled_as_a_whole_leaves_plain_names_in_files_and_checkpoints(tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
    _, given = compiled("whole", "eager")
    trainer(tmp_path, [compression(tmp_path), saver], enable_checkpointing=True).fit(given, datamodule=Corners())

    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    plain = Net()
    plain.load_state_dict(state)
    reloaded = load_compressed(tmp_path / "model.safetensors", Net()).state_dict()
    assert reloaded.keys() == state.keys()
    for name in ("first.weight", "second.weight", "head.weight"):
        assert torch.equal(reloaded[name], state[name])


def test_a_wrapped_layer_keeps_the_names_of_torch_and_is_refused_by_the_plain_model(tmp_path):
    net, given = compiled("wrapped", "eager")
    trainer(tmp_path, [compression(tmp_path)]).fit(given, datamodule=Corners())

    again, _ = compiled("wrapped", "eager")
    for name, tensor in load_compressed(tmp_path / "model.safetensors", again).state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    with pytest.raises(
        ArtifactError, match=r"puts _orig_mod\. into names: wrap the same layers, or use layer\.compile"
    ):
        load_compressed(tmp_path / "model.safetensors", Net())


@pytest.mark.parametrize("way", ["inner", pytest.param("whole", marks=pytest.mark.slow)])
def test_what_is_compiled_in_place_loads_into_the_plain_and_into_the_compiled_model(tmp_path, way):
    net, given = compiled(way, "eager")
    trainer(tmp_path, [compression(tmp_path)]).fit(given, datamodule=Corners())

    other, _ = compiled("inner", "eager")
    for target in (Net(), other):
        for name, tensor in load_compressed(tmp_path / "model.safetensors", target).state_dict().items():
            assert torch.equal(tensor, net.state_dict()[name]), name


def test_a_second_fit_of_a_compiled_model_begins_anew(tmp_path):
    """Graphs of the first fit know its hooks."""
    twin, _ = fit(tmp_path / "twin", [compression(tmp_path / "twin", quantization=Quantization("int8"))], Net)
    expected, _ = fit(tmp_path / "twin2", [compression(tmp_path / "twin2", quantization=Quantization("int8"))], twin)

    torch.manual_seed(0)
    net, _ = compiled("inner", "eager")
    for folder in ("one", "two"):
        fit(tmp_path / folder, [compression(tmp_path / folder, quantization=Quantization("int8"))], net)

    for name, tensor in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
