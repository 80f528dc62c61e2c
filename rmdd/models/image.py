"""Image towers: a small ConvNet and all timm models, without classifier.

Shapes: B images of H x W pixels, F features of each image.
"""

import contextlib
import difflib
import functools
import math
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmdd.config import ImageTower
from rmdd.core import seeding
from rmdd.core.files import sha256_file
from rmdd.models.group_norm import norm_relu_pool

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


class Support(Enum):
    """Whether an image tower works with exact trajectory matching, which differentiates the tower's gradient again."""

    YES = "supported"
    MATH = "supported with the math attention kernel"
    NO = "not supported"
    UNTESTED = "untested"


# A key is a timm module (a family of models), or a single model if the models of a module differ in support. MATH: the
# models may call torch's fused attention, which has no second derivative. NO: the models use hardsigmoid, which torch
# cannot differentiate twice.
SUPPORT: dict[str, Support] = {
    "convnet": Support.YES,
    **dict.fromkeys(
        "convmixer convnext cspnet densenet dla dpn edgenext efficientformer efficientnet efficientvit_mit "
        "efficientvit_msra focalnet hgnet hrnet inception_v3 levit mambaout mlp_mixer mobilenetv4_conv_small "
        "mobilenetv4_conv_medium mobilenetv4_conv_large mvitv2 nfnet regnet repvit resnet resnetv2 sequencer starnet "
        "swin_transformer_v2 swin_transformer_v2_cr vgg vovnet".split(),
        Support.YES,
    ),
    **dict.fromkeys(
        "beit byobnet cait crossvit davit deit eva fastvit hiera maxxvit metaformer mobilenetv4_hybrid_medium "
        "mobilenetv4_hybrid_large nest nextvit pit pvt_v2 swin_transformer tiny_vit twins vision_transformer "
        "vision_transformer_relpos visformer volo xcit".split(),
        Support.MATH,
    ),
    **dict.fromkeys("ghostnet mobilenetv3 rdnet".split(), Support.NO),
}


def double_backward(name: str) -> Support:
    """Return whether gradients through the tower `name` can be differentiated again (measured per family of towers)."""
    if name == "convnet" or name.startswith(HUB_PREFIXES):
        return SUPPORT.get(name, Support.UNTESTED)
    import timm

    check_name(name)
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return SUPPORT.get(name.partition(".")[0], SUPPORT.get(family, Support.UNTESTED))


@contextlib.contextmanager
def matching_context(tower: nn.Module | str) -> Iterator[None]:
    """A context with the math attention kernel, in which trajectory matching can differentiate twice through `tower`.

    `tower` is a name or a module. Raises `ValueError` for a trainable tower that is known to have no second derivative.
    """
    for name in [tower] if isinstance(tower, str) else _trained_architectures(tower):
        if double_backward(name) is Support.NO:
            raise ValueError(
                f"image tower '{name}' does not support trajectory matching: an operation has no second derivative; "
                "choose another model.image.name, or set model.image.trainable: false"
            )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def _trained_architectures(module: nn.Module) -> list[str]:
    cfgs = [(m, getattr(m, "pretrained_cfg", None)) for m in module.modules()]
    trained = [(m, cfg) for m, cfg in cfgs if isinstance(cfg, dict) and any(p.requires_grad for p in m.parameters())]
    return [cfg["architecture"] for _, cfg in trained if "architecture" in cfg]


def build_image_tower(tower: ImageTower, generator: torch.Generator, image_size: int = 224) -> nn.Module:
    """Build a tower that maps (B, 3, image_size, image_size) to (B, width); this width is the attribute `width`.

    All random weights come from `generator`; running statistics of batch norms are frozen. Raises `ValueError` for
    unknown names, for weights that are unavailable or do not fit, and for images that are too small.
    """
    if tower.name == "convnet":
        return _convnet(tower, generator, image_size)
    generator = _generator_of(tower, generator)
    model = _create(tower.name, tower.weights == "pretrained", generator, image_size)
    if tower.weights != "pretrained" and not tower.is_random:
        _load(model, weights_file(tower))
    freeze_statistics(model)
    model.width = _width(model, tower.name, image_size)
    return model


def _generator_of(tower: ImageTower, generator: torch.Generator) -> torch.Generator:
    """Return a generator seeded with SEED if the weights of the tower are `random:SEED`, otherwise `generator`."""
    if not tower.weights.startswith("random:"):
        return generator
    return seeding.generator(int(tower.weights.removeprefix("random:")), "shared tower")


def normalisation_of(tower: ImageTower) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and deviation, per colour channel, that normalised the training images of a timm tower."""
    if tower.name == "convnet":
        raise ValueError("convnet defines no normalisation; set data.normalise to clip, imagenet or half")
    import timm

    if tower.name.startswith(HUB_PREFIXES):
        cfg = _create(tower.name, False, torch.Generator(), None).pretrained_cfg
    else:
        check_name(tower.name)
        cfg = timm.get_pretrained_cfg(tower.name).to_dict()  # type: ignore[union-attr]
    return tuple(cfg["mean"]), tuple(cfg["std"])


def image_identity(tower: ImageTower) -> str:
    """Return what identifies a tower's weights: `random[:SEED]`, the SHA-256 of a file, or hub id and timm version."""
    if tower.is_random:
        return tower.weights
    if tower.weights != "pretrained":
        path = weights_file(tower)
        return _sha256_once(path, path.stat().st_mtime_ns, path.stat().st_size)
    import timm

    check_name(tower.name)
    config = None if tower.name.startswith(HUB_PREFIXES) else timm.get_pretrained_cfg(tower.name)
    source = config and (config.hf_hub_id or config.url)
    return f"{source or tower.name}, timm {timm.__version__}"


def weights_file(tower: ImageTower) -> Path:
    """Return the local file that `tower.weights` names. Raises `ValueError` if the file does not exist."""
    path = Path(tower.weights).expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"no weights file '{path}'; set model.image.weights to pretrained, random or an existing file")
    return path


@functools.lru_cache(maxsize=16)
def _sha256_once(path: Path, changed_ns: int, size: int) -> str:
    return sha256_file(path)


def freeze_statistics(module: nn.Module) -> nn.Module:
    """Keep layers with running statistics in eval mode, even after a call of `train()`.

    The outputs of a student must depend only on its parameters. If batches changed the running statistics, a training
    step that is recomputed in the backward pass would differ from the original step. Checkpoints would be incomplete,
    because they hold only parameters.
    """
    for layer in module.modules():
        if layer._buffers.keys() & {"running_mean", "running_var"}:
            layer.train = functools.partial(_stay_in_eval, layer)  # type: ignore[method-assign]
            layer.eval()
    return module


def _stay_in_eval(layer: nn.Module, mode: bool = True) -> nn.Module:
    layer.training = False
    for child in layer.children():
        child.train(mode)
    return layer


class ConvNet(nn.Module):
    """A network of blocks (3x3 convolution, GroupNorm, ReLU, 2x2 average pooling) that returns flat features."""

    def __init__(self, widths: tuple[int, ...], groups: int, image_size: int, generator: torch.Generator):
        super().__init__()
        blocks: list[nn.Module] = []
        for fan_in, fan_out in zip((3, *widths), widths, strict=False):
            norm = nn.GroupNorm(min(groups, fan_out), fan_out)
            blocks += [_convolution(fan_in, fan_out, generator), norm, nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.width = widths[-1] * (image_size >> len(widths)) ** 2

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        x = images
        if x.device.type == "cpu":  # channels-last makes the first convolution several times faster
            x = x.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.blocks[::4], self.blocks[1::4], strict=True):
            assert isinstance(norm, nn.GroupNorm)
            x = norm_relu_pool(convolution(x), norm.weight, norm.bias, norm.num_groups, norm.eps)
        return x.flatten(1)


def _convolution(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Conv2d:
    """Build a 3x3 convolution with PyTorch's default initialisation, drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Conv2d, fan_in, fan_out, 3, padding=1)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(9 * fan_in)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def _convnet(tower: ImageTower, generator: torch.Generator, image_size: int) -> ConvNet:
    if tower.weights == "pretrained":
        raise ValueError("convnet has no pretrained weights; set model.image.weights to random or a weights file")
    if not tower.widths:
        raise ValueError("convnet needs at least one width; set model.image.widths, such as [64, 128, 128]")
    for width in tower.widths:
        if width % min(tower.groups, width):
            raise ValueError(
                f"convnet width {width} is not divisible by {tower.groups} groups; "
                "choose model.image.widths that are multiples of model.image.groups"
            )
    if image_size >> len(tower.widths) == 0:
        raise ValueError(
            f"images of {image_size} pixels are too small for convnet, which halves them {len(tower.widths)} times; "
            "use a larger data.image_size or fewer model.image.widths"
        )
    net = ConvNet(tower.widths, tower.groups, image_size, _generator_of(tower, generator))
    if not tower.is_random:
        _load(net, weights_file(tower))
    return net


def check_name(name: str) -> None:
    """Raise a `ValueError` that lists similar names, unless `name` is a timm model or a hub id."""
    import timm

    if name.startswith(HUB_PREFIXES) or timm.is_model(name):
        return
    names = ["convnet", *timm.list_models()]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"the closest names are {', '.join(near)}" if near else "see timm.list_models()"
    raise ValueError(f"unknown image tower '{name}', expected convnet or a timm model; {hint}")


def _create(name: str, pretrained: bool, generator: torch.Generator, image_size: int | None) -> Any:
    import timm

    check_name(name)
    seed = int(torch.randint(2**62, (), generator=generator))
    create = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # timm draws initial weights from torch's global generator
        try:
            try:
                return create(img_size=image_size)
            except TypeError as error:  # convolutional towers accept any size and have no argument img_size
                if "img_size" not in str(error):
                    raise
            return create()
        except (OSError, RuntimeError) as error:
            if not pretrained and not name.startswith(HUB_PREFIXES):
                raise ValueError(f"timm cannot build image tower '{name}': {error}") from error
            raise ValueError(
                f"could not fetch image tower '{name}' from the hub ({' '.join(str(error).split())[:200]}); without a "
                "network set model.image.weights to random or to a local .safetensors or .pth file of this model"
            ) from error


def _load(model: nn.Module, path: Path) -> None:
    """Load the weights in the file `path` into `model`; a classifier in the file is ignored."""
    import timm

    # timm's filter renames parameters of older files and resizes position embeddings to the image size
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    try:
        state = convert(timm.models.load_state_dict(str(path), device="cpu", weights_only=True), model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights file '{path}' holds no state dict ({reason}); give a .safetensors file") from error
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    expected = model.state_dict()
    state = {k: v for k, v in state.items() if k in expected or not k.startswith(tuple(f"{c}." for c in classifiers))}
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape},
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})" for kind, keys in problems.items() if keys
        )
        raise ValueError(f"weights file '{path}' does not fit the image tower: {listed}; give a file of the same model")
    model.load_state_dict(state)


def _width(model: nn.Module, name: str, image_size: int) -> int:
    """Return the number of features that `model` returns for an image, measured with an image of zeros."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, 3, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"image tower '{name}' does not accept images of {image_size} pixels ({error}); set another data.image_size"
        ) from error
    model.train(was_training)
    if len(shape) != 2:
        raise ValueError(
            f"image tower '{name}' returns features of shape {shape}, expected (1, width); choose another "
            "model.image.name"
        )
    return shape[1]
