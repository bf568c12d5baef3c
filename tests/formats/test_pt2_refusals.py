"""Models that cannot be a pt2 file, and files that are damaged or forged: refused with the reason."""

import hashlib
import random

import pytest
import torch
from torch import nn

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats.pt2 import check_pt2, read_pt2
from lightning_xai_compress.formats.registry import Inputs

from pt2_nets import CONFIG, EXTRA, export, forge, quantize, swap
from traced_nets import FixedBatch, OnData, SecondReference, cnn


def test_without_examples_the_error_asks_for_one(tmp_path):
    model = cnn()

    with pytest.raises(ArtifactError, match=r"the format 'pt2' traces the model.*pass examples=\[Inputs\(\(x,\)\)\]"):
        export(model, quantize(model), tmp_path / "m.pt2")


def test_a_model_that_branches_on_data_is_refused_with_the_reason(tmp_path, capfd):
    model = OnData().train()

    with pytest.raises(ArtifactError) as caught:
        export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))

    assert str(caught.value).startswith("OnData could not be traced: GuardOnDataDependentSymNode: Could not guard")
    assert "Leave formats that trace (onnx, pt2) out, or define a forward" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_is_refused_by_the_name_of_the_input(tmp_path):
    model = FixedBatch()

    with pytest.raises(ArtifactError, match=r"Constraints violated \(x\.size\(\)\[0\]\).*no fixed batch size"):
        export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(3, 4),)))


def test_a_weight_that_stays_float_in_the_graph_is_refused_by_name(tmp_path):
    model = SecondReference()

    with pytest.raises(ArtifactError, match=r"fc\.weight is in the graph, but not as the parameter of its layer"):
        export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))


class Noisy(OnData):
    def forward(self, x):
        return self.fc(x) + torch.randn(2)


def test_a_model_with_random_outputs_is_refused(tmp_path):
    model = Noisy()

    with pytest.raises(ArtifactError, match=r"output: .*gives other outputs.*no random numbers"):
        export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))


def test_a_weight_off_its_grid_is_refused_by_name(tmp_path):
    model = cnn()
    plan = quantize(model, (4,))
    with torch.no_grad():
        model[6].weight[3, 2] += 0.3 * plan.scales["6.weight"][3]

    with pytest.raises(ArtifactError, match=r"6\.weight does not lie on its grid: 1 of 96 .* channel 3"):
        export(model, plan, tmp_path / "m.pt2", Inputs((torch.randn(2, 3, 8, 8),)))
    assert not (tmp_path / "m.pt2").exists()


def test_a_plan_of_another_model_is_refused(tmp_path):
    plan = quantize(nn.Sequential(nn.Linear(4, 3)))

    with pytest.raises(ArtifactError, match=r"the plan names what Linear lacks: 0\.weight"):
        export(nn.Linear(4, 3), plan, tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))


def test_the_check_notices_a_model_that_has_changed(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    example = Inputs((torch.randn(2, 4),))
    export(model, quantize(model), tmp_path / "m.pt2", example)
    with torch.no_grad():
        model[0].bias += 1e-6

    with pytest.raises(ArtifactError, match=r"does not give these tensors back exactly: 0\.bias\. It is of another"):
        check_pt2(tmp_path / "m.pt2", model, [example])


# --- bad files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), Inputs((torch.randn(2, 5),))
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    export(model, quantize(model), path, example)
    return path.read_bytes(), model, example


def test_a_flipped_bit_anywhere_is_refused(tmp_path, written):
    data, model, example = written
    path = tmp_path / "bad.pt2"
    draw = random.Random(0)
    for place in [*range(40), *range(len(data) - 200, len(data)), *draw.sample(range(len(data)), 1500)]:
        bad = bytearray(data)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"is damaged, or was not written|is no pt2 archive"):
            read_pt2(path)
    with pytest.raises(ArtifactError, match="is damaged, or was not written"):
        check_pt2(path, model, [example])


def test_a_file_that_is_cut_short_is_refused(tmp_path, written):
    data, *_ = written
    path = tmp_path / "bad.pt2"
    for length in [*range(80), *range(80, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"is damaged, or was not written|is no pt2 archive"):
            read_pt2(path)


def test_a_file_of_torch_export_is_refused(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)), tmp_path / "m.pt2")

    with pytest.raises(ArtifactError, match="was not written by this package"):
        read_pt2(tmp_path / "m.pt2")


FORGERIES = {
    "a pickle among the weights": (
        {CONFIG: swap(b'"use_pickle": false', b'"use_pickle": true')},
        "as a pickled object",
    ),
    "pickled inputs": ({"data/sample_inputs/model.pt": lambda _: b"cos\nsystem"}, "pickled inputs; not read"),
    "native code": ({"data/aotinductor/model/a.so": lambda _: b"ELF"}, r"a\.so.*not read"),
    "a path out of the archive": ({CONFIG: swap(b'"weight_0"', b'"weight_0/../../x"')}, "damaged"),
    "another version": (
        {EXTRA: swap(b'"version":1', b'"version":4')},
        r"has version 4 of the index, expected one of \(1, 2, 3\)",
    ),
    "another byte order": ({"byteorder": lambda _: b"big"}, "big-endian"),
    "a name twice": ({EXTRA: swap(b'"name":"2.bias"', b'"name":"0.bias"')}, "0.bias is there twice"),
    "an unknown dtype": ({EXTRA: swap(b'"float32"', b'"object"')}, "damaged: expected an index that fits"),
    "a huge shape": ({EXTRA: swap(b'"shape":[3,5]', b'"shape":[3,5000000000000]')}, "damaged"),
    "a negative shape": ({EXTRA: swap(b'"shape":[3,5]', b'"shape":[3,-5]')}, "damaged"),
    "a width of 16": (
        {EXTRA: swap(b'"groups":[[', b'"groups":[[16,9999999999999],[')},
        "damaged: expected an index that fits",
    ),
    "rows that are not there": (
        {EXTRA: swap(b'"groups":[', b'"groups":[[4,99],')},
        "damaged: expected an index that fits",
    ),
    "text for JSON": ({EXTRA: lambda _: b"nothing"}, "damaged: expected a pt2 archive that holds together"),
    "a list for an index": ({EXTRA: lambda _: b"[]"}, "damaged"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_is_refused_and_nothing_in_it_is_run(tmp_path, written, forgery):
    changes, reason = FORGERIES[forgery]
    forge(written[0], tmp_path / "forged.pt2", changes)

    with pytest.raises(ArtifactError, match=reason):
        read_pt2(tmp_path / "forged.pt2")


def test_forging_nothing_gives_a_good_file(tmp_path, written):
    data, model, example = written
    forge(data, tmp_path / "same.pt2", {})

    assert check_pt2(tmp_path / "same.pt2", model, [example]) == 0.0


def test_a_member_that_unfolds_to_more_than_deflate_can_is_refused(tmp_path, written):
    data, *_ = written
    forge(data, tmp_path / "m.pt2", {})
    content = bytearray((tmp_path / "m.pt2").read_bytes()[:-64])
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = (2**31).to_bytes(4, "little")
    (tmp_path / "m.pt2").write_bytes(bytes(content) + hashlib.sha256(content).hexdigest().encode())

    with pytest.raises(ArtifactError, match="far larger than the file"):
        read_pt2(tmp_path / "m.pt2")


def test_a_missing_file_is_no_artifact_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pt2(tmp_path / "m.pt2")


def test_tensors_without_values_are_refused_and_empty_ones_come_back(tmp_path):
    model = OnMeta(torch.zeros(0, 3))
    export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))
    assert {each.name: tuple(each.values.shape) for each in read_pt2(tmp_path / "m.pt2").tensors}["spare"] == (0, 3)

    model = OnMeta(torch.zeros(2, device="meta"))
    with pytest.raises(ArtifactError, match="spare: expected plain tensors with values"):
        export(model, quantize(model), tmp_path / "m.pt2", Inputs((torch.randn(2, 4),)))


class OnMeta(OnData):
    def __init__(self, spare):
        super().__init__()
        self.register_buffer("spare", spare)

    def forward(self, x):
        return self.fc(x)
