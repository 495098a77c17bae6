"""I rely on: a classifier sees every step it is given, knows what is absent, and can be folded."""

import math

import pytest
import torch
import torch.nn as nn

import cspine
from cspine import PatientClassifier, UserError, VertebraClassifier, classifier_loss

BACKBONES = ("tf_efficientnetv2_b0", "convnext_nano", "resnet18d")


def random_crops(*shape, seed=0):
    """uint8 (B, N, 6, S, S) with every vertebra in view."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def small():
    """A patient classifier and the vertebra classifier, both of a tiny backbone."""
    torch.manual_seed(0)
    return PatientClassifier("lcnet_050").eval(), VertebraClassifier("lcnet_050").eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_any_timm_backbone_takes_six_channels(name):
    model = VertebraClassifier(name).eval()
    with torch.inference_mode():
        logits = model(random_crops(1, 15, 6, 32, 32))
    assert logits.shape == (1, 15) and torch.isfinite(logits).all()
    assert next(p for p in model.encoder.backbone.parameters() if p.ndim == 4).shape[1] == 6


def test_the_patient_classifier_answers_105_steps_and_the_patient(small):
    with torch.inference_mode():
        steps, patient = small[0](random_crops(2, 105, 6, 32, 32))
    assert steps.shape == (2, 105) and patient.shape == (2,)


def test_the_patient_is_answered_by_the_largest_and_the_mean_of_all_steps(small):
    """As the shipped weights have learnt it."""
    model = small[0]
    with torch.inference_mode():
        features = torch.randn(2, 105, model.encoder.absent.numel())
        _, patient = model.answer(features)
        steps, _ = model.patient_lstm(features)
        expected = model.patient_head(torch.cat([steps.max(1).values, steps.sum(1) / 105], 1))
    assert torch.allclose(patient, expected[:, 0], atol=1e-5)


def test_a_third_of_the_steps_is_a_sample_too(small):
    crops = random_crops(1, 35, 6, 32, 32)
    crops[:, 10:15] = 0  # the third vertebra is not in view
    with torch.inference_mode():
        steps, patient = small[0](crops)
        one = small[1](crops[:, :5])
    assert steps.shape == (1, 35) and patient.shape == (1,) and one.shape == (1, 5)
    labels = torch.tensor([[1.0, 0, math.nan, 0, 0, 0, 0, 1]])
    loss = classifier_loss((steps, patient), labels)
    doubled = classifier_loss((steps.repeat_interleave(3, 1), patient), labels)
    assert loss.item() == pytest.approx(doubled.item(), rel=1e-5)


def test_bytes_and_unit_floats_give_the_same_answer(small):
    crops = random_crops(1, 15, 6, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(small[1](crops), small[1](crops.float() / 255), atol=1e-4)


def test_a_training_shows_the_backbone_what_an_answer_does():
    """Of a backbone without norms of a batch."""
    model, crops = VertebraClassifier("test_convnext3", hidden=8), random_crops(1, 15, 6, 32, 32)
    with torch.inference_mode():
        for shown in (crops, crops / 255):
            assert torch.allclose(model.train()(shown), model.eval()(shown), atol=1e-5)


def test_half_precision_ends_where_the_steps_are_read(small):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        steps, patient = small[0](random_crops(1, 105, 6, 32, 32))
    assert steps.dtype == patient.dtype == torch.float32


def test_samples_of_a_batch_do_not_meet(small):
    crops = random_crops(3, 15, 6, 32, 32)
    with torch.inference_mode():
        together = small[1](crops)
        for k in range(3):
            assert torch.allclose(together[k], small[1](crops[k : k + 1])[0], atol=1e-4)


def test_every_step_and_channel_matters_and_context_flows_both_ways():
    torch.manual_seed(1)
    model, crops = use_norms(VertebraClassifier("resnet10t")), random_crops(1, 15, 6, 32, 32)
    with torch.inference_mode():
        plain = model(crops)
        for step, channel in ((1, 0), (7, 3), (13, 5)):
            other = crops.clone()
            other[0, step, channel] = 255 - other[0, step, channel]
            moved = (model(other) - plain).abs()[0]
            assert moved[step - 1 : step + 2].min() > 1e-6, (step, channel)


def test_an_absent_vertebra_costs_nothing_and_its_pixels_are_not_looked_at(small):
    model, seen = small[0], []
    hook = model.encoder.backbone.register_forward_hook(lambda m, given, out: seen.append(len(out)))
    crops = random_crops(1, 105, 6, 32, 32)
    crops[0, 30:45, -1] = 0  # C3 has no mask
    with torch.inference_mode():
        steps, _ = model(crops)
        assert sum(seen) == 90
        crops[0, 30:45] = 0
        assert torch.allclose(model(crops)[0], steps)
        blank = model(torch.zeros(1, 105, 6, 32, 32, dtype=torch.uint8))
    hook.remove()
    assert sum(seen) == 180 and torch.isfinite(blank[0]).all() and torch.isfinite(blank[1]).all()


def test_the_token_of_the_absent_learns(small):
    model = PatientClassifier("lcnet_050").train()
    crops = random_crops(1, 105, 6, 32, 32)
    crops[0, :15, -1] = 0
    labels = torch.tensor([[math.nan, 1, 0, 0, 0, 0, 0, 1]])
    classifier_loss(model(crops), labels).backward()
    assert model.encoder.absent.grad.abs().max() > 0
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


def cross_entropy(logit, label):
    return math.log(1 + math.exp(-logit if label else logit))


def test_the_loss_of_a_vertebra_is_worked_out_by_hand():
    outputs = torch.zeros(2, 15)
    outputs[0], outputs[1, 3] = 2.0, -1.0
    labels = torch.tensor([[1.0], [0.0]])
    positive = cross_entropy(2, 1)  # weighs double
    negative = (14 * cross_entropy(0, 0) + cross_entropy(-1, 0)) / 15
    expected = (2 * positive + negative) / 2
    assert float(classifier_loss(outputs, labels)) == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_a_patient_weighs_as_the_metric_and_leaves_out_the_unknown():
    steps = torch.arange(7.0).repeat_interleave(15)[None] - 3  # -3 ... 3
    labels = torch.tensor([[0, 1, 0, 0, math.nan, 0, 1, 1.0]])
    terms = [(1, -3, 0), (2, -2, 1), (1, -1, 0), (1, 0, 0), (1, 2, 0), (2, 3, 1), (14, 0.5, 1)]
    expected = sum(w * cross_entropy(x, y) for w, x, y in terms) / 14
    found = classifier_loss((steps, torch.tensor([0.5])), labels)
    assert float(found) == pytest.approx(expected, abs=1e-5)
    nothing = classifier_loss(torch.zeros(1, 15), torch.tensor([[math.nan]]))
    assert float(nothing) == 0


def test_the_loss_of_a_batch_is_the_mean_of_its_studies():
    """So that parts of a batch, or ranks, add up, however the fractures lie among them."""
    torch.manual_seed(3)
    steps, patient = torch.randn(4, 105), torch.randn(4)
    labels = (torch.rand(4, 8) < 0.4).float()
    labels[1, 2] = labels[3, 5] = math.nan
    apart = [classifier_loss((steps[k:k + 1], patient[k:k + 1]), labels[k:k + 1]) for k in range(4)]
    assert float(classifier_loss((steps, patient), labels)) == pytest.approx(
        float(torch.stack(apart).mean()), rel=1e-5)


def test_an_unknown_backbone_is_one_line():
    with pytest.raises(UserError, match="--backbone no_such_network") as caught:
        cspine.new_model("vertebra", {"backbone": "no_such_network"})
    assert "\n" not in str(caught.value)


def test_settings_rebuild_the_model(small):
    for model in small:
        again = type(model)(**model.settings).eval()
        again.load_state_dict(model.state_dict())
        with torch.inference_mode():
            n = 105 if isinstance(model, PatientClassifier) else 15
            a, b = (m(random_crops(1, n, 6, 32, 32)) for m in (model, again))
        assert torch.equal(a[0], b[0])


def use_norms(model):
    """Norms as after a training, so that folding them wrongly shows."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((module.running_mean, -0.5, 0.5), (module.weight, 0.5, 1.5),
                                      (module.running_var, 0.5, 2), (module.bias, -0.5, 0.5)):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


FUSED = [("vertebra", name, left) for name, left in (
    ("tf_efficientnetv2_b0", 0), ("convnext_nano", 0), ("resnet18d", 0), ("lcnet_050", 0),
    ("mobilenetv4_conv_small", 0), ("resnetv2_50d", None))] + [
    ("segmenter", name, left) for name, left in (
        ("tf_efficientnetv2_b0", 0), ("resnet18d", 0), ("lcnet_050", 0), ("repvgg_a0", None),
        ("ghostnet_050", None))]  # whose first feature is a convolution that a norm follows


@pytest.mark.parametrize("kind, name, left", FUSED)
def test_fused_norms_change_no_answer(kind, name, left):
    """`left`: norms that no convolution precedes (None: some)."""
    torch.manual_seed(2)
    model = use_norms(cspine.KINDS[kind](name))
    before = norms(model)
    x = torch.rand(1, 1, 32, 48, 32) if kind == "segmenter" else random_crops(1, 15, 6, 48, 48)
    with torch.inference_mode():
        expected = model(x)
        fused = cspine.fuse_norms(model)
        found = fused(x)
    assert norms(fused) == left if left is not None else norms(fused) < before
    assert type(fused) is cspine.KINDS[kind] and not fused.training
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_patients_lstm_is_not_the_vertebrae_own():
    model = cspine.PatientClassifier("test_resnet", hidden=16)
    own = {p.data_ptr() for p in model.patient_lstm.parameters()}
    assert own and own.isdisjoint(p.data_ptr() for p in model.encoder.lstm.parameters())
