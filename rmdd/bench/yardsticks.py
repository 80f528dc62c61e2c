"""Reference loops for the benchmark: a full unroll with autograd, and the two-pass loop of the papers' released code.

B is the number of pairs in a mini-batch, K the number of inner steps.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call

from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, zeros_like
from rmdd.models.dual import DualEncoder, Params, tower_of
from rmdd.models.image import ConvNet

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Loss function: maps scores (B, B) and target similarity (B, B) to a scalar."""


def plain(model: DualEncoder) -> DualEncoder:
    """Return a model with the parameters of `model` that runs a ConvNet layer by layer, without optimised code."""
    tower = model.image_tower
    if isinstance(tower, ConvNet):
        tower = _Plain(tower)
    return DualEncoder(tower, model.image_head, model.text_head, model.temperature)


class _Plain(nn.Module):
    def __init__(self, net: ConvNet):
        super().__init__()
        self.blocks = net.blocks

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images).flatten(1)


def whole_unroll(
    model: DualEncoder,
    loss: PairLoss,
    start: Params,
    target: Params,
    synthetic: Synthetic,
    batches: Int[Tensor, "K B"],
) -> tuple[Tensor, Synthetic]:
    """Return the matching loss and its exact gradient for the set. Autograd goes through all K inner steps."""
    leaf = synthetic.map(lambda t: t.detach().requires_grad_())
    rates = {"image": leaf.lr_image, "text": leaf.lr_text}
    theta = {n: p.detach().requires_grad_() for n, p in start.items()}
    for index in batches:
        scores = functional_call(model, theta, (leaf.images[index], leaf.texts[index]))
        labels = similarity.dense(similarity.gather(leaf.similarity, index), leaf.alpha, scores)
        grads = torch.autograd.grad(loss(scores, labels), list(theta.values()), create_graph=True)
        theta = {n: p - rates[tower_of(n)] * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    miss = torch.zeros_like(leaf.lr_image)
    for tower in rates:
        names = [n for n in start if tower_of(n) == tower]
        reach = sum((start[n] - target[n]).square().sum() for n in names)
        miss = miss + sum((theta[n] - target[n]).square().sum() for n in names) / reach
    named = leaf.tensors()
    grads = torch.autograd.grad(miss, list(named.values()), allow_unused=True, materialize_grads=True)
    return miss.detach(), synthetic.with_tensors(dict(zip(named, grads, strict=True)))


class _Flat:
    """Function of an input and one flat parameter vector: the network of one modality. A call splits the vector."""

    def __init__(self, parts: nn.Module):
        self.parts = parts
        self.named = {n: p for n, p in parts.named_parameters() if p.requires_grad}

    def __call__(self, x: Tensor, vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in self.named.values()])
        views = {n: v.view(p.shape) for (n, p), v in zip(self.named.items(), pieces, strict=True)}
        out = functional_call(self.parts, views, (x,))
        return out / out.norm(dim=1, keepdim=True)


def published(
    build: Callable[[], DualEncoder],
    loss: PairLoss,
    start: Params,
    target: Params,
    synthetic: Synthetic,
    batches: Int[Tensor, "K B"],
) -> tuple[Tensor, Synthetic]:
    """Compute one iteration like the released code of LoRS; RepBlend and PTM-ST released the same loop.

    The loop has all properties of that code that cost time or memory: one parameter vector per modality; `create_graph`
    in both passes; separate calls for image and text gradients; clones of every mini-batch; parameters that autograd
    links from step to step; the graph of a step in memory until the next step ends; learning rates read with `.item()`.
    In every iteration, `build` builds the encoder anew, as in the released code.
    """
    model = build()
    nets = {"image": _Flat(nn.Sequential(model.image_tower, model.image_head)), "text": _Flat(model.text_head)}
    names = {tower: [n for n in start if tower_of(n) == tower] for tower in nets}
    begin = {t: torch.cat([start[n].reshape(-1) for n in names[t]]) for t in nets}
    goal = {t: torch.cat([target[n].reshape(-1) for n in names[t]]) for t in nets}
    visited = {t: [begin[t].clone().requires_grad_()] for t in nets}
    total = {t: torch.zeros_like(begin[t]) for t in nets}
    leaf = synthetic.map(lambda t: t.detach().requires_grad_())
    rates = {"image": leaf.lr_image, "text": leaf.lr_text}
    steps = []

    def inner(images: Tensor, texts: Tensor, labels: Tensor, step: int) -> Tensor:
        u = nets["image"](images, visited["image"][step])
        v = nets["text"](texts, visited["text"][step])
        return loss(u @ v.t() / model.temperature, labels)

    for step, index in enumerate(batches):
        images, texts = leaf.images[index], leaf.texts[index]
        parts = similarity.gather(leaf.similarity, index)
        labels = similarity.dense(parts, leaf.alpha, texts)
        steps.append((images.clone(), texts.clone(), parts, labels))
        value = inner(images, texts, labels, step)
        g_image = torch.autograd.grad(value, visited["image"][step], create_graph=True)[0]
        g_text = torch.autograd.grad(value, visited["text"][step], create_graph=True)[0]
        for tower, g in (("image", g_image), ("text", g_text)):
            fixed = g.detach().clone()
            visited[tower].append(visited[tower][step] - rates[tower].item() * fixed)
            total[tower] += fixed
        del g, g_image, g_text

    reach = {t: (begin[t] - goal[t]).square().sum() for t in nets}
    gradient = zeros_like(synthetic)
    for step, index in enumerate(batches):
        images, texts, parts, labels = steps[step]
        value = inner(images, texts, labels, step)
        toward = {t: rates[t].item() * (goal[t] - begin[t]) + rates[t].item() ** 2 * total[t] for t in nets}
        g_image = torch.autograd.grad(value, visited["image"][step], create_graph=True, retain_graph=True)[0]
        g_text = torch.autograd.grad(value, visited["text"][step], create_graph=True, retain_graph=True)[0]
        grand = toward["image"] @ g_image / reach["image"] + toward["text"] @ g_text / reach["text"]
        back = torch.autograd.grad(2 * grand, [images, texts, *parts.values()])
        gradient.images[index] += back[0]
        gradient.texts[index] += back[1]
        similarity.scatter_add(gradient.similarity, index, dict(zip(parts, back[2:], strict=True)))

    miss = torch.zeros_like(leaf.lr_image)
    for tower, rate in rates.items():
        ahead = begin[tower] - rate * total[tower] - goal[tower]
        miss = miss + ahead.dot(ahead) / reach[tower]
    gradient.lr_image.copy_(torch.autograd.grad(miss, rates["image"], retain_graph=True)[0])
    gradient.lr_text.copy_(torch.autograd.grad(miss, rates["text"])[0])
    if math.isnan(miss.item()):
        raise FloatingPointError("the matching loss is NaN")
    return miss.detach(), gradient
