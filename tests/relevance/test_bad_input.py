"""What cannot be scored is refused with the batch, layer or setting named; what is left out is counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zennit.composites import EpsilonPlus

from lightning_xai_compress import RelevanceError, score
from lightning_xai_compress.errors import NonFiniteError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
PASSES = ["lrp", "taylor", "fisher", "wanda"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


@pytest.mark.parametrize("criterion", PASSES)
@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda z: None, "the model returned a NoneType: expected a tensor of logits"),
        (
            lambda z: (None, z),
            r"the model returned a tuple of \(a NoneType, a torch.float32 tensor of shape \(6, 3\)\)",
        ),
        (lambda z: {"scores": z}, r"the model returned a dict with keys \['scores'\].* with 'logits' or 'out'"),
        (lambda z: z.tolist(), "define relevance_step on the LightningModule"),
    ],
)
def test_a_model_that_returns_no_tensor_is_refused(output, text, criterion):
    class Other(Net):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(RelevanceError, match=text):
        score(Other(), [(X, Y)], criterion)


class Constant(Net):
    def forward(self, x):
        return super().forward(torch.ones(len(x), 4))


class Stored(Net):
    def relevance_step(self, batch, batch_idx):
        return self(X[:2]).sum()


@pytest.mark.parametrize("model", [Constant(), Stored()], ids=["constant input", "stored example"])
def test_an_explained_tensor_that_does_not_depend_on_the_input_is_refused(model):
    with pytest.raises(RelevanceError, match="does not depend on the input: it is the same for another batch"):
        score(model, [(X, Y)])


@pytest.mark.parametrize("freeze", ["no_grad", "detach"])
def test_a_frozen_backbone_is_no_constant(freeze):
    class Frozen(Net):
        def forward(self, x):
            if freeze == "detach":
                return self.second(F.relu(self.first(x)).detach())
            with torch.no_grad():
                x = F.relu(self.first(x))
            return self.second(x)

    scores = score(Frozen(), [(X, Y)])

    assert scores.unknown == ["first.weight"]
    assert scores.score["second.weight"].any()


def test_an_explained_tensor_that_depends_on_no_layer_is_refused():
    class Aside(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def relevance_step(self, batch, batch_idx):
            return (batch[0] * self.scale).sum()

    with pytest.raises(RelevanceError, match=r"depends on none of the layers to score: .* from first\.weight, second"):
        score(Aside(), [(X, Y)])


def test_a_layer_that_is_asked_for_but_not_used_is_named():
    model = Net()
    model.idle = nn.Linear(4, 3)

    with pytest.raises(RelevanceError, match=r"depends on none of the layers to score: .* from idle\.weight"):
        score(model, [(X, Y)], layers=["idle.weight"])


@pytest.mark.parametrize("criterion", PASSES)
def test_no_batches_are_refused(criterion):
    with pytest.raises(RelevanceError, match="no sample to score: expected at least one batch with samples"):
        score(Net(), [], criterion)


@pytest.mark.parametrize("criterion", PASSES)
@pytest.mark.parametrize("batch", [(X[:0], Y[:0]), {"x": X[:0], "y": Y[:0]}], ids=["pair", "mapping"])
def test_an_empty_batch_is_refused_by_number(batch, criterion):
    class Reshaping(Net):
        def forward(self, x):
            return super().forward(x.view(len(x), 2, -1).flatten(1))  # fails for no samples

    with pytest.raises(RelevanceError, match=r"batch 1 holds no samples: its first tensor has shape \(0, 4\)"):
        score(Reshaping(), [(X, Y), batch], criterion)


@pytest.mark.parametrize("criterion", PASSES)
@pytest.mark.parametrize("batch", [(X.to("meta"), Y), {"x": X, "y": Y.to("meta")}], ids=["input", "target"])
def test_a_batch_on_another_device_is_refused_by_number(batch, criterion):
    with pytest.raises(RelevanceError, match="batch 1 is on meta, but the model is on cpu: move one to the other"):
        score(Net(), [(X, Y), batch], criterion)


def test_a_single_batch_in_place_of_a_sequence_of_them_is_explained():
    with pytest.raises(RelevanceError, match=r"pass \[batch\] for a single one"):
        score(Net(), (X, Y))


def with_value(x, value):
    x = x.clone()
    x[3, 1] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("criterion", ["lrp", "taylor", "fisher", "deeplift"])
def test_a_value_in_a_batch_that_is_not_finite_names_the_batch(value, criterion):
    with pytest.raises(NonFiniteError, match="batch 1: what is explained is not finite, for the batch itself is not"):
        score(Net(), [(X, Y), (with_value(X, value), Y)], criterion)


@pytest.mark.parametrize("composite", ["epsilon", "zplus"])
@pytest.mark.parametrize("criterion", ["lrp", "taylor", "fisher"])
def test_a_weight_that_is_not_finite_names_its_layer(criterion, composite):
    model = Net()
    model.second.weight.data[1, 2] = torch.nan

    with pytest.raises(NonFiniteError, match=r"batch 0: .* the output of second\.weight is not finite"):
        score(model, [(X, Y)], criterion, composite=composite)


def test_activations_that_overflow_name_the_layer():
    model = Net()
    model.first.weight.data.fill_(3e38)

    with pytest.raises(NonFiniteError, match=r"batch 0: .* the output of first\.weight is not finite"):
        score(model, [(1 + X.abs(), Y)])


def test_values_that_are_not_finite_on_the_way_back_name_the_parameter():
    class Root(Net):
        def forward(self, x):
            return self.second((0 * self.first(x)).sqrt())  # infinite slope at zero

    with pytest.raises(NonFiniteError, match=r"relevance of first\.weight is not finite after 1 batches"):
        score(Root(), [(X, Y)])


def test_inputs_that_are_not_finite_name_the_layer_where_they_are_all_that_counts():
    with pytest.raises(NonFiniteError, match=r"the input of first\.weight is not finite"):
        score(Net(), [(with_value(X, torch.nan), Y)], "wanda")


def lowered(model):
    model.second.bias.data.sub_(100.0)
    return model


@pytest.mark.parametrize("explain", ["logit", "predicted"])
def test_logits_that_are_all_negative_are_refused_with_a_way_out(explain):
    with pytest.raises(RelevanceError, match=r"all 12 explained logits are <= 0.*train the model first, or.*'margin'"):
        score(lowered(Net()), [(X, Y), (X, Y)], explain=explain)

    assert score(lowered(Net()), [(X, Y)], explain="margin").samples == 6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"criterion": "lrpp"}, "criterion must be one of lrp, deeplift, .* got 'lrpp'"),
        ({"criterion": 3}, "criterion must be one of lrp, .* got 3"),
        ({"criterion": "no.such.function"}, "criterion 'no.such.function' cannot be imported"),
        ({"composite": "zplusplus"}, "composite must be one of epsilon, .* or a zennit Composite, got 'zplusplus'"),
        ({"composite": EpsilonPlus}, "composite must be one of"),
        ({"composite": "epsilon_gamma_box"}, r"pass zennit.composites.EpsilonGammaBox\(low=..., high=...\)"),
        ({"explain": "class"}, "explain must be 'margin', 'logit' or 'predicted', got 'class'"),
        ({"statistics": ["median"]}, r"statistics must be a list of some of rms, absolute, .* got \['median'\]"),
        ({"statistics": "rms"}, "statistics must be a list of some of .* got 'rms'"),
        ({"attention": "rollout"}, "attention must be 'attnlrp' or 'cp', got 'rollout'"),
        ({"epsilon": -1e-6}, "epsilon must be >= 0, got -1e-06"),
        ({"epsilon": float("nan")}, "epsilon must be >= 0, got nan"),
        ({"heatmaps": -1}, "heatmaps must be >= 0, got -1"),
        ({"layers": ["frist.weight"]}, r"layers names no parameter: \['frist.weight'\]; names look like: first.weight"),
    ],
    ids=str,
)
def test_unknown_settings_are_refused_with_the_choices(settings, text):
    with pytest.raises(ValueError, match=text):
        score(Net(), [(X, Y)], **settings)


@pytest.mark.parametrize("model", [F.relu, Net, "resnet18"], ids=["function", "class", "name"])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module, got a (function|type|str)"):
        score(model, [(X, Y)])


def test_a_model_without_layers_is_refused():
    with pytest.raises(RelevanceError, match="ReLU has no layer to score: expected a Linear, convolution or Embedding"):
        score(nn.ReLU(), [(X, Y)])


class Same(nn.Module):
    """Logits are the input: the relevance of the identity matrix is the mean of what is explained."""

    def __init__(self, size=3, conv=False):
        super().__init__()
        self.fc = nn.Conv2d(size, size, 1, bias=False) if conv else nn.Linear(size, size, bias=False)
        self.fc.weight.data = torch.eye(size).view_as(self.fc.weight)

    def forward(self, x):
        return self.fc(x)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [-2.0, -4.0, -3.0], [1.0, 5.0, 2.0]])
CLASSES = torch.tensor([0, 0, 1, -100])
LABELS = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]])
VALUES = torch.tensor([[5.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
PIXELS = LOGITS.T.reshape(1, 3, 2, 2)


@pytest.mark.parametrize(
    ("x", "y", "explain", "diagonal", "samples", "left_out"),
    [
        # the true logits are 2, -1 and -4; the last sample is not to be explained
        (LOGITS, CLASSES, "logit", [2, 0, 0], 1, 2),
        # the largest are 2, 3 and -2
        (LOGITS, CLASSES, "predicted", [2, 3, 0], 2, 1),
        # the true labels have 2 and -1, 3 and 0, -2
        (LOGITS, LABELS, "logit", [2, 3, 0], 2, 3),
        # labels are predicted where logits are positive: 2 and 0.5, 3, none, all
        (LOGITS, LABELS, "predicted", [2 + 1, 3 + 5, 0.5 + 2], 3, 6),
        # regression has no sign to watch
        (LOGITS, VALUES, "logit", [0, 3, -0.5], 4, 0),
        (LOGITS, VALUES, "predicted", [0, 3, -0.5], 4, 0),
        # the same as classes, for the four pixels of one image
        (PIXELS, CLASSES.view(1, 2, 2), "logit", [2, 0, 0], 1, 2),
        (PIXELS, CLASSES.view(1, 2, 2), "predicted", [2, 3, 0], 1, 1),
        # the same as four tokens of one text, classes last
        (LOGITS.unsqueeze(0), CLASSES.view(1, 4), "predicted", [2, 3, 0], 1, 1),
    ],
)
def test_explained_logits_that_are_not_positive_are_left_out_and_counted(x, y, explain, diagonal, samples, left_out):
    model = Same(conv=x.dim() == 4)

    scores = score(model, [(x, y)], explain=explain, epsilon=0.0)

    assert (scores.samples, scores.left_out) == (samples, left_out)
    expected = torch.diag(torch.tensor(diagonal, dtype=torch.float32)) / samples
    torch.testing.assert_close(scores.relevance["fc.weight"].flatten(1), expected)


def test_left_out_logits_add_up_over_batches():
    scores = score(Same(), [(LOGITS[:2], CLASSES[:2]), (LOGITS[2:], CLASSES[2:])], explain="logit")

    assert (scores.samples, scores.left_out, scores.batches) == (1, 2, 2)


def test_samples_with_nothing_to_explain_do_not_count():
    """Class -100, and 255 where there are fewer classes, as CrossEntropyLoss(ignore_index=...) leaves them out."""
    whole = score(Same(), [(LOGITS, torch.tensor([0, 255, -100, 2]))])
    part = score(Same(), [(LOGITS[[0, 3]], torch.tensor([0, 2]))])

    assert whole.samples == 2
    torch.testing.assert_close(whole.relevance, part.relevance)
    with pytest.raises(RelevanceError, match="no sample to score"):
        score(Same(), [(LOGITS, torch.full((4,), -100))])


def test_class_255_counts_where_there_are_more_classes():
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))

    assert score(Same(300), [(x, torch.tensor([255, 1]))]).samples == 2


@pytest.mark.parametrize("explain", ["margin", "logit", "predicted"])
def test_a_class_without_a_logit_is_refused(explain):
    with pytest.raises(RelevanceError, match="target holds class 3, but the logits have 3 classes: expected 0 to 2"):
        score(Same(), [(LOGITS, torch.tensor([0, 3, 1, 1]))], explain=explain)


def test_targets_of_another_length_are_refused():
    with pytest.raises(RelevanceError, match=r"logits of shape \(4, 3\) and a torch.int64 target of shape \(1,\)"):
        score(Same(), [(LOGITS, torch.tensor([1]))])
