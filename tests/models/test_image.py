import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from rmdd.config import ImageTower
from rmdd.core.seeding import generator
from rmdd.models.image import (
    SUPPORT,
    Support,
    build_image_tower,
    double_backward,
    freeze_statistics,
    image_identity,
    matching_context,
    normalisation_of,
)

TINY = timm.list_models("test_*")
CONVNET = ImageTower(name="convnet", weights="random", widths=(8, 12), groups=4)


def build(name, size=64, seed=0, **fields):
    return build_image_tower(ImageTower(name=name, **({"weights": "random"} | fields)), generator(seed, "tower"), size)


def second_order(tower, size=64):
    """Return the gradient of <g, v> in the images; g is the gradient of a loss in the parameters, v a random vector."""
    draw = generator(0, "probe")
    images = torch.randn(2, 3, size, size, generator=draw, requires_grad=True)
    features = tower(images)
    loss = (features * torch.randn(features.shape, generator=draw)).sum() + features.square().sum()
    grads = torch.autograd.grad(loss, list(tower.parameters()), create_graph=True, allow_unused=True)
    miss = sum((g * torch.randn(g.shape, generator=draw)).sum() for g in grads if g is not None)
    return torch.autograd.grad(miss, images)[0]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_convnet_equals_its_blocks_in_plain_torch():
    net = build_image_tower(CONVNET, generator(0, "tower"), 18)
    assert net.width == 12 * 4 * 4 == net(torch.zeros(2, 3, 18, 18)).shape[1]
    images = torch.randn(2, 3, 18, 18, generator=generator(0, "images"))
    p, expected = list(net.parameters()), images
    for weight, bias, scale, shift in (p[:4], p[4:]):
        expected = torch.nn.functional.conv2d(expected, weight, bias, padding=1)
        expected = torch.nn.functional.group_norm(expected, 4, scale, shift).relu()
        expected = torch.nn.functional.avg_pool2d(expected, 2)
    torch.testing.assert_close(net(images), expected.flatten(1))


def test_convnet_uses_only_the_generator_and_the_default_distribution():
    state = torch.random.get_rng_state()
    net = build_image_tower(ImageTower(name="convnet", weights="random", widths=(64, 64)), generator(3, "tower"), 16)
    assert torch.equal(state, torch.random.get_rng_state())
    for layer in (net.blocks[0], net.blocks[4]):
        bound = layer.weight[0].numel() ** -0.5
        for values in (layer.weight, layer.bias):
            assert 0.8 * bound < values.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("tower", [CONVNET, ImageTower(name="test_resnet", weights="random")], ids=lambda t: t.name)
def test_the_generator_decides_the_weights(tower):
    state = torch.random.get_rng_state()
    a, b, c = (build_image_tower(tower, generator(seed, "tower"), 32) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(a, b) and not equal(a, c)


@pytest.mark.parametrize(
    "fields, size, words",
    [
        ({"widths": (12,), "groups": 8}, 16, "12 is not divisible by 8 groups"),
        ({"widths": (8,) * 5}, 16, "16 pixels are too small for convnet, which halves them 5 times"),
        ({"widths": ()}, 16, "at least one width"),
        ({"weights": "pretrained"}, 16, "no pretrained weights; set model.image.weights to random"),
    ],
)
def test_convnet_refuses_wrong_settings(fields, size, words):
    with pytest.raises(ValueError, match=words):
        build("convnet", size, **fields)


@pytest.mark.parametrize("name", TINY)
def test_the_support_table_is_right_for_timm_families(name):
    tower = build(name, 160 if name == "test_maxvit" else 64).train()
    assert double_backward(name) in (Support.YES, Support.MATH)
    with matching_context(tower):
        grad = second_order(tower, 160 if name == "test_maxvit" else 64)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    if double_backward(name) is Support.YES:
        torch.testing.assert_close(grad, second_order(tower))


def test_fused_attention_needs_the_math_kernel():
    assert double_backward("test_vit") is Support.MATH
    with pytest.raises(RuntimeError, match="not implemented"):
        second_order(build("test_vit"))


def test_towers_without_double_backward_are_refused_only_if_trainable():
    tower = build("lcnet_035")
    assert double_backward("lcnet_035") is Support.NO
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        second_order(tower)
    for module_or_name in (tower, "lcnet_035"):
        with pytest.raises(ValueError, match="no second derivative; choose another model.image.name"):
            matching_context(module_or_name).__enter__()
    with matching_context(torch.nn.Sequential(tower.requires_grad_(False))):
        pass


def test_second_derivative_agrees_with_finite_differences():
    net = build_image_tower(CONVNET, generator(0, "tower"), 8).double()
    net.blocks[2] = net.blocks[6] = torch.nn.Softplus()  # finite differences fail at ReLU's kink
    images = torch.randn(2, 3, 8, 8, generator=generator(0, "images"), dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def features(images, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), images).square().sum()

    assert torch.autograd.gradgradcheck(features, (images, *parameters), fast_mode=True)


def test_double_backward_accepts_all_forms_of_model_names():
    assert double_backward("convnet") is double_backward("nfnet_l0.ra2_in1k") is Support.YES
    assert double_backward("vit_base_patch16_224") is Support.MATH
    assert double_backward("mobilenetv3_large_100") is Support.NO
    assert double_backward("mobilenetv4_conv_small.e2400_r224_in1k") is Support.YES
    assert double_backward("hf-hub:someone/something") is Support.UNTESTED
    families = {timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in timm.list_models()}
    assert set(SUPPORT) <= families | set(timm.list_models()) | {"convnet"}


def test_a_forward_pass_does_not_change_batch_statistics():
    tower = build("test_resnet").train()
    before = [b.clone() for b in tower.buffers()]
    images = 5 + torch.randn(4, 3, 64, 64, generator=generator(0, "images"))
    out = tower(images)
    assert all(torch.equal(a, b) for a, b in zip(before, tower.buffers(), strict=True))
    torch.testing.assert_close(out[:1], tower(images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_frozen_statistics_survive_a_copy(again):
    net = freeze_statistics(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout()))
    twin = again(net).train()
    assert twin[1].training and not twin[0].training
    net[0].training = True
    twin.train()
    assert net[0].training, "the copy must freeze its own layer, not the original layer"


@pytest.mark.parametrize("name, size", [("test_vit", 64), ("test_vit", 96), ("test_convnext", 50), ("test_nfnet", 64)])
def test_width_is_the_length_of_the_output(name, size):
    tower = build(name, size)
    assert tower(torch.zeros(2, 3, size, size)).shape == (2, tower.width)


def test_width_of_a_tower_whose_head_widens():
    assert build("mobilenetv4_conv_small", 32).width == 1280


@pytest.mark.parametrize("save, file", [(save_file, "w.safetensors"), (torch.save, "w.pth")])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_weights_from_a_file_without_its_classifier(name, save, file, tmp_path):
    classifier = timm.create_model(name, num_classes=7, **({"img_size": 64} if name == "test_vit" else {}))
    save(classifier.state_dict(), tmp_path / file)
    tower = build(name, weights=str(tmp_path / file)).eval()
    images = torch.randn(2, 3, 64, 64, generator=generator(0, "images"))
    classifier.reset_classifier(0)
    torch.testing.assert_close(tower(images), classifier.eval()(images))


def test_weights_of_convnet_from_a_file(tmp_path):
    net = build_image_tower(CONVNET, generator(0, "tower"), 16)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    again = CONVNET.model_copy(update={"weights": str(tmp_path / "w.safetensors")})
    assert equal(net, build_image_tower(again, generator(1, "tower"), 16))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = build("test_resnet").state_dict()
    state.pop("conv1.0.weight")
    state["bn1.weight"] = torch.zeros(1)
    save_file(state | {"surprise": torch.zeros(1)}, tmp_path / "w.safetensors")
    words = r"1 missing \(conv1.0.weight\); 1 unexpected \(surprise\); 1 of another shape \(bn1.weight\)"
    with pytest.raises(ValueError, match=words):
        build("test_resnet", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="pretrained, random or an existing file"):
        build("test_resnet", weights=str(tmp_path / "absent.pth"))


def test_a_pickled_module_is_never_run(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        build("test_resnet", weights=str(tmp_path / "w.pth"))


def test_errors_for_unknown_names_suggest_similar_names():
    with pytest.raises(ValueError, match="unknown image tower 'nfnet_10'.*nfnet_l0"):
        build("nfnet_10")
    with pytest.raises(ValueError, match="cannot build image tower 'test_vit.nonsense'"):
        build("test_vit.nonsense")
    with pytest.raises(ValueError, match="does not accept images of 50 pixels.*data.image_size"):
        build("test_vit", 50)


def test_errors_of_failed_downloads_name_the_offline_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not fetch.*random or to a local .safetensors"):
        build("test_vit.r160_in1k", weights="pretrained")


def test_normalisation():
    assert normalisation_of(ImageTower()) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation_of(ImageTower(name="test_vit")) == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="convnet defines no normalisation"):
        normalisation_of(CONVNET)


def test_the_identity_depends_on_the_weights(tmp_path):
    assert image_identity(CONVNET) == image_identity(ImageTower(name="test_vit", weights="random")) == "random"
    names = {image_identity(ImageTower(name=name)) for name in ("test_vit", "vit_base_patch16_224.dino")}
    assert names == {f"timm/{n}, timm {timm.__version__}" for n in ("test_vit.r160_in1k", "vit_base_patch16_224.dino")}
    save_file({"a": torch.zeros(1)}, tmp_path / "original.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "original.safetensors").read_bytes())
    original, copied = (ImageTower(weights=str(tmp_path / f"{name}.safetensors")) for name in ("original", "copy"))
    before = image_identity(original)
    assert before == image_identity(copied) and len(before) == 64
    save_file({"a": torch.ones(2)}, tmp_path / "original.safetensors")
    assert image_identity(original) != before
    with pytest.raises(ValueError, match="no weights file"):
        image_identity(ImageTower(weights=str(tmp_path / "absent.pth")))


def test_nfnet_l0_is_the_published_tower():
    tower = build("nfnet_l0", 32)
    assert len(list(tower.parameters())) == 219
    assert sum(p.numel() for p in tower.parameters()) == 32_769_488
    assert not list(tower.buffers())
    assert tower.width == 2304
