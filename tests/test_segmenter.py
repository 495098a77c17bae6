"""I rely on: the 3-D network is the 2-D one, and the segmenter answers for every cell."""

import contextlib
import copy
import itertools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame

import cspine
from cspine import Segmenter, UserError, segmenter_loss, to_3d

BACKBONES = ("tf_efficientnetv2_s", "tf_efficientnetv2_b0", "resnet18d")
SMALL = "tf_mobilenetv3_small_075"  # with SAME padding and squeeze-excite
WIDER = (SMALL, "mobilenetv4_conv_small", "repvgg_a0", "regnety_002")
DEPTH = 9  # planes of a constant volume; its middle is far from the padding of one layer


def flat_network(name, seed=0):
    """A timm feature backbone in use: random norms, so that no layer is an identity."""
    torch.manual_seed(seed)
    model = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def networks():
    """name -> (2-D network, its 3-D twin), each made once."""
    made = {}

    def get(name):
        if name not in made:
            flat = flat_network(name)
            made[name] = flat, to_3d(flat).eval()
        return made[name]
    return get


def inputs_and_outputs(model, x):
    """path -> (input, output) of every module that is given one tensor and returns one."""
    seen, hooks = {}, []
    for path, module in model.named_modules():
        def before(_, given, path=path):  # activations in place overwrite what they are given
            seen[path] = given[0].clone() if torch.is_tensor(given[0]) else None, None

        def after(_, given, out, path=path):
            if torch.is_tensor(out) and len(given) == 1:
                seen[path] = seen[path][0], out.clone()
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {path: pair for path, pair in seen.items() if pair[0] is not None and pair[1] is not None}


def worst_layers(flat, solid, shape=(21, 34)):
    """path -> relative difference between a 3-D layer's middle plane and the 2-D layer.

    Every layer (and squeeze-excite, as a whole) gets the input that the 2-D network gave its
    twin, repeated along the new axis: one that is wrong cannot hide behind those before it.
    """
    out, twins = {}, dict(solid.named_modules())
    seen = inputs_and_outputs(flat, torch.randn(1, 3, *shape))
    for path, (given, expected) in seen.items():
        twin = twins[path]
        volume, leaf = None, not list(twin.children()) or "Norm" in type(twin).__name__
        if leaf or "Excite" in type(twin).__name__:
            out[path] = float("inf")  # does not run, or gives another size
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                volume = twin(given[:, :, None].repeat(1, 1, DEPTH, 1, 1))
            if volume is None or volume.shape[3:] != expected.shape[2:]:
                continue
            middle = volume[:, :, volume.shape[2] // 2]
            scale = expected.abs().max().clamp(min=1e-3)
            out[path] = float((middle - expected).abs().max() / scale)
    return out


@pytest.mark.parametrize("name", BACKBONES + WIDER)
def test_every_layer_of_the_twin_is_the_flat_one_on_a_constant_volume(name, networks):
    errors = worst_layers(*networks(name))
    assert len(errors) > 20
    bad = {path: e for path, e in errors.items() if e > 2e-5}  # float32, up to 2,000 products
    assert not bad


def lose_activations(solid):
    for module in solid.modules():
        if isinstance(module, nn.BatchNorm3d) and hasattr(module, "act"):
            module.act = nn.Identity()


def squeeze_two_axes(solid):
    for module in solid.modules():
        if isinstance(module, cspine.SqueezeExcite3d):
            module.forward = lambda x, m=module: x * nn.Sequential.forward(
                m, x.mean((2, 3), keepdim=True))


def forget_biases(solid):
    for module in solid.modules():
        if isinstance(module, cspine.SqueezeExcite3d):
            for conv in module.modules():
                if isinstance(conv, nn.Conv3d):
                    nn.init.normal_(conv.bias)


def pad_like_torch(solid):
    for module in solid.modules():
        if isinstance(module, cspine.Conv3dSame):
            module.forward = lambda x, m=module: nn.Conv3d.forward(m, x)


def pad_first_axis_first(solid):
    def forward(x, m):
        padding = []
        for n, k, stride in zip(x.shape[2:], m.kernel_size, m.stride):
            total = max(k - (n % stride or stride), 0)
            padding += [total // 2, total - total // 2]
        return nn.Conv3d.forward(m, F.pad(x, padding))
    for module in solid.modules():
        if isinstance(module, cspine.Conv3dSame):
            module.forward = lambda x, m=module: forward(x, m)


def repeat_without_dividing(solid):
    for module in solid.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data *= module.kernel_size[0]


@pytest.mark.parametrize("trap", (lose_activations, squeeze_two_axes, forget_biases,
                                  pad_like_torch, pad_first_axis_first, repeat_without_dividing))
def test_each_trap_put_back_is_seen(trap, networks):
    flat, solid = networks(SMALL)
    wrong = copy.deepcopy(solid)
    trap(wrong)
    assert max(worst_layers(flat, wrong).values()) > 1e-2


def test_same_padding_gives_the_sizes_of_the_flat_layer_on_every_axis():
    for kernel, stride in itertools.product((1, 3, 6), (1, 2, 3)):
        flat = Conv2dSame(2, 3, kernel, stride)
        solid = to_3d(flat)
        for n, m in itertools.product((7, 8, 9), (16, 17)):
            with torch.no_grad():
                size = tuple(flat(torch.zeros(1, 2, n, m)).shape[2:])
                volume = solid(torch.zeros(1, 2, m, n, m))
            assert volume.shape[2:] == (size[1], *size), (kernel, stride, n, m)


def test_128_becomes_64_32_16_8(networks):
    _, solid = networks(SMALL)
    with torch.no_grad():
        features = solid(torch.zeros(1, 3, 128, 16, 32))
    assert [tuple(f.shape[2:]) for f in features] == [
        (64, 8, 16), (32, 4, 8), (16, 2, 4), (8, 1, 2)]


@pytest.mark.parametrize("name", ("resnet10t", "repvgg_a0"))
def test_the_whole_network_is_the_flat_one_far_from_the_ends(name, networks):
    flat, solid = networks(name)  # no squeeze-excite, whose mean would see the ends
    image = torch.randn(1, 3, 16, 32)
    with torch.no_grad():
        expected, found = flat(image), solid(image[:, :, None].repeat(1, 1, 288, 1, 1))
    for level, (a, b) in enumerate(zip(expected, found)):
        middle = b[:, :, b.shape[2] // 2]
        assert torch.allclose(a, middle, rtol=1e-3, atol=1e-4 * float(a.abs().max())), level


def test_the_twin_keeps_names_and_leaves_the_original_alone(networks):
    flat, solid = networks("resnet18d")
    before = {name: t.clone() for name, t in flat.state_dict().items()}
    assert list(solid.state_dict()) == list(flat.state_dict())
    twin = to_3d(flat)
    for module in twin.modules():
        for tensor in module.parameters(False):
            tensor.data.zero_()
    assert all(torch.equal(t, before[name]) for name, t in flat.state_dict().items())


@pytest.mark.parametrize("name, layer", (
    ("tf_mixnet_s", "MixedConv2d"), ("nf_regnet_b0", "ScaledStdConv2d"),
    ("resnetblur18", "BlurPool2d"), ("ecaresnet26t", "EcaModule"),
    ("skresnet18", "SelectiveKernel")))
def test_an_unknown_layer_is_refused_by_name(name, layer):
    flat = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
    with pytest.raises(UserError, match=rf"no 3-D twin of .*\.[\w.]+: unknown .*{layer}"):
        to_3d(flat)


class Odd2d(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), True)


@pytest.mark.parametrize("layer", (
    nn.Conv2d(3, 4, (3, 5)), nn.Conv2d(3, 4, 3, dilation=(1, 2)), nn.Conv2d(3, 4, 3, stride=(1, 2)),
    nn.Conv2d(3, 4, 3, padding=(0, 1)),
    nn.ConvTranspose2d(3, 4, 2),
    nn.AdaptiveAvgPool2d(1), nn.MaxPool2d((2, 1)), nn.Linear(3, 4), nn.LayerNorm(4),
    nn.MultiheadAttention(4, 1), Odd2d()))
def test_a_layer_with_no_sure_twin_is_refused(layer):
    with pytest.raises(UserError, match="no 3-D twin of Sequential.1:"):
        to_3d(nn.Sequential(nn.Identity(), layer))


@pytest.mark.parametrize("layer", (
    nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.Conv2d(4, 4, 5, padding=2),
    nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    Conv2dSame(4, 4, 3, 2), nn.MaxPool2d((2, 2)),
    nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    nn.BatchNorm2d(4), BatchNormAct2d(4), nn.ReLU(), nn.SiLU(), nn.Dropout(0.5)))
def test_a_single_layer_is_the_flat_one(layer):
    torch.manual_seed(1)
    image, layer = torch.randn(2, 4, 21, 14), layer.eval()
    solid = to_3d(layer).eval()
    with torch.no_grad():
        flat, volume = layer(image), solid(image[:, :, None].repeat(1, 1, DEPTH, 1, 1))
    middle = volume[:, :, volume.shape[2] // 2]
    assert middle.shape == flat.shape and torch.allclose(middle, flat, atol=1e-5)


@pytest.mark.parametrize("name", (SMALL, "resnet10t"))
def test_the_output_has_the_size_of_the_input_from_64_to_192(name):
    with torch.device("meta"):
        model = Segmenter(name).eval()
        for n in range(64, 193, 16):
            for size in ((n, 64, 192), (64, n, n)):
                assert model(torch.zeros(1, 1, *size)).shape == (1, 7, *size)


def test_real_volumes_come_out_in_their_size_and_others_are_refused():
    model = Segmenter("lcnet_050").eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 1, 64, 80, 96)).shape == (1, 7, 64, 80, 96)
        with pytest.raises(UserError, match="multiples of 16"):
            model(torch.rand(1, 1, 64, 72, 64))


@pytest.mark.parametrize("name", ("resnet10t", "repvgg_a0"))  # the latter has two stems
def test_one_channel_is_the_volume_repeated_to_three_colours(name, tmp_path):
    flat, model = flat_network(name), Segmenter(name).eval()
    torch.save(flat.state_dict(), tmp_path / "colours.pth")
    cspine.load_init(model, tmp_path / "colours.pth")
    repeated, x = to_3d(flat).eval(), torch.rand(1, 1, 32, 16, 32) * 4 - 2
    with torch.inference_mode():
        for one, three in zip(model.encoder(x), repeated(x.repeat(1, 3, 1, 1, 1))):
            assert torch.allclose(one, three, rtol=1e-4, atol=1e-4 * float(three.abs().max()))


def test_each_output_cell_comes_from_its_own_place_in_the_decoder():
    model = Segmenter("lcnet_050").eval()
    x = torch.rand(1, 1, 32, 48, 16)
    with torch.inference_mode():
        x = (x - 0.5) * 4
        cells = x[0, 0].reshape(16, 2, 24, 2, 8, 2).permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
        *skips, deep = model.encoder(x)
        skips[0] = torch.cat([skips[0], cells[None]], 1)
        x = x / 4 + 0.5
        for block, skip in zip(model.decoder, skips[::-1]):
            deep = block(torch.cat([F.interpolate(deep, skip.shape[2:]), skip], 1))
        coarse, fine = model.head(deep)[0], model(x)[0]
    for v, z, y, x in itertools.product((0, 6), range(32), range(0, 48, 7), range(16)):
        part = v * 8 + (z % 2) * 4 + (y % 2) * 2 + x % 2
        assert torch.isclose(fine[v, z, y, x], coarse[part, z // 2, y // 2, x // 2], atol=1e-5)


def test_the_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = Segmenter("lcnet_050", drop_path=0.05, dropout=0.1).train()
    labels = torch.randint(0, 8, (2, 32, 32, 32), dtype=torch.uint8)
    segmenter_loss(model(torch.rand(2, 1, 32, 32, 32)), labels).backward()
    without = [name for name, p in model.named_parameters()
               if not name.startswith("encoder.blocks.5")  # at stride 32, beyond the features
               and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not without
    assert model.encoder.conv_stem.weight.grad.abs().max() > 0


def test_the_loss_is_dice_of_what_is_in_view_and_ten_times_the_cross_entropy():
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    labels[0, :2] = 3  # C3 fills half of the cube, the others are not in view
    logits = torch.full((1, 7, 4, 4, 4), -20.0)
    logits[0, 2, :2] = 20
    assert float(segmenter_loss(logits, labels)) == pytest.approx(0, abs=1e-4)
    logits[0, 2] = 0  # half sure everywhere: overlap 16, sizes 32 and 32
    dice = (2 * 16 + 1) / (32 + 32 + 1)
    entropy = torch.tensor(2.0).log().item() / 7
    assert float(segmenter_loss(logits, labels)) == pytest.approx(10 * entropy + 1 - dice, abs=1e-4)
    nothing = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    assert torch.isfinite(segmenter_loss(logits, nothing))


def test_the_loss_of_half_precision_is_summed_in_single():
    """float16 ends at 65,504, and a cube has two million cells."""
    torch.manual_seed(0)
    logits = torch.randn(1, 7, 32, 48, 48).half()
    labels = torch.randint(0, 2, (1, 32, 48, 48), dtype=torch.uint8)
    assert torch.equal(segmenter_loss(logits, labels), segmenter_loss(logits.float(), labels))


@pytest.mark.parametrize("name, why", (
    ("no_such_network", "no_such_network"), ("convnext_nano", "strides 2, 4, 8 and 16")))
def test_a_backbone_that_does_not_fit_is_one_line(name, why):
    with pytest.raises(UserError, match=why) as caught:
        cspine.new_model("segmenter", {"backbone": name})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device, layout", (
    ("cpu", torch.channels_last_3d), ("cuda:0", torch.contiguous_format)))
def test_weights_lie_as_the_device_is_fastest_with(device, layout):
    model = cspine.new_model("segmenter", {"backbone": SMALL}, torch.device(device))
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv3d)]
    assert all(weight.is_contiguous(memory_format=layout) for weight in kernels)
    other, = {torch.channels_last_3d, torch.contiguous_format} - {layout}
    assert not all(weight.is_contiguous(memory_format=other) for weight in kernels)


@pytest.mark.parametrize("device, layout", (
    ("cpu", torch.channels_last_3d), ("meta", torch.contiguous_format)))
def test_a_loaded_segmenter_lies_as_its_device_is_fastest_with(device, layout):
    """"meta" stands for any device but the CPU; what takes over on the CPU lies as there."""
    weights = cspine.HERE / "weights"
    ensemble = cspine.load_ensemble(weights, torch.device(device))
    for one, wanted in ((ensemble, layout), (ensemble.on_cpu, torch.channels_last_3d)):
        model, = one.models["segmenter"] if one else [None]
        layers = model.modules() if model else ()
        kernels = [layer.weight for layer in layers if isinstance(layer, nn.Conv3d)]
        assert all(weight.is_contiguous(memory_format=wanted) for weight in kernels)


@pytest.mark.parametrize("first, end, again", ((1, 20, True), (0, 20, False), (40, 63, True),
                                               (40, 64, False)))
def test_a_neck_that_the_study_cuts_is_not_looked_at_again(first, end, again):
    """Without the context of the wide view, the vertebra at the cut was misnamed more often."""
    probability = torch.zeros(7, 64, 64, 64)
    probability[3, first:end, 28:36, 28:36] = 1
    assert (cspine.neck_part(probability, (200, 512, 512)) is not None) == again
