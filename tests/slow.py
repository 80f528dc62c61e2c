"""Slow reference implementations of distillation in float64, without the engine: losses, gradients and outer loop."""

import itertools

import torch
import torch.nn.functional as F
from torch.func import functional_call

from rmdd.distill.loop import State, outer_step


def wbce(logits, similarity):
    """Return the weighted BCE loss of LoRS: half the sum of the mean losses over positive and over negative pairs."""
    p = torch.sigmoid(logits)
    entry = -similarity * torch.log(p + 1e-6) - (1 - similarity) * torch.log(1 - p + 1e-6)
    positive = (similarity > 0.5).double()
    return sum((entry * mask).sum() / (mask.sum() + 1e-6) for mask in (positive, 1 - positive)) / 2


def infonce(logits, similarity):
    """Return the InfoNCE loss of MTT-VL: cross entropy in both directions; text i is the only positive of image i."""
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole_similarity(leaves, alpha):
    """Return the similarity matrix S of all pairs; the identity if `leaves` has no similarity tensors."""
    if "similarity.matrix" in leaves:
        return leaves["similarity.matrix"]
    identity = torch.eye(len(leaves["texts"]), dtype=torch.float64)
    if "similarity.scale" not in leaves:
        return identity
    left, right = leaves["similarity.left"], leaves["similarity.right"]
    return identity * leaves["similarity.scale"] + alpha / left.shape[1] * left @ right.T


def plain_loss(model, loss):
    """Return the loss of one inner step as a function: (parameters, images, texts, similarity, step) -> number."""

    def value(theta, images, texts, similarity, step):
        return loss(functional_call(model, theta, (images, texts)), similarity)

    return value


def rate_of(rates, name):
    """Return the inner learning rate of the parameter `name`: that of the tower to which the parameter belongs."""
    return rates["lr_text" if name.startswith("text_head.") else "lr_image"]


def flat(params, tower):
    """Concatenate all parameters of one tower to one vector."""
    mine = [p.flatten() for n, p in params.items() if n.startswith("text_head.") == (tower == "text")]
    return torch.cat(mine)


def weights(start, target, merged):
    """Return the divisor of each tower's squared miss: the squared start distance of the tower, or of both towers."""
    way = {m: (flat(start, m) - flat(target, m)).square().sum() for m in ("image", "text")}
    return dict.fromkeys(way, sum(way.values())) if merged else way


def segment(made, drawn):
    """Return the start and target parameters of a draw on the original trajectory."""
    expert = made.matcher.experts[drawn.expert]
    return [made.store.read(expert, drawn.start + ahead) for ahead in (0, 1)]


def shortcut(store, expert, endpoint, epoch):
    """Return parameters on PTM-ST's shortcut at a real epoch: each tensor moves to `endpoint` by its arc length."""
    walk = [store.read(expert, t) for t in range(endpoint + 1)]
    point = {}
    for name in walk[0]:
        steps = [(b[name].float() - a[name].float()).double().norm().item() for a, b in itertools.pairwise(walk)]
        gone = sum(steps[: int(epoch)]) + (epoch - int(epoch)) * (steps[int(epoch)] if epoch < endpoint else 0)
        share = gone / sum(steps) if sum(steps) else 0.0
        point[name] = (1 - share) * walk[0][name] + share * walk[endpoint][name]
    return point


def full_unroll(loss, start, target, leaves, alpha, batches, merged=False):
    """Return the gradients of the miss for all tensors in `leaves`, differentiated through the full unroll."""
    similarity = whole_similarity(leaves, alpha)
    theta = {n: p.clone().requires_grad_() for n, p in start.items()}
    for step, index in enumerate(batches):
        block = similarity[index][:, index]
        value = loss(theta, leaves["images"][index], leaves["texts"][index], block, step)
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {n: p - rate_of(leaves, n) * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    scale = weights(start, target, merged)
    miss = sum((flat(theta, m) - flat(target, m)).square().sum() / scale[m] for m in scale)
    return dict(zip(leaves, torch.autograd.grad(miss, list(leaves.values())), strict=True))


def two_passes(loss, start, target, leaves, alpha, batches, merged=False, merged_rates=None):
    """Return the gradients of TESLA in two passes over the steps; in the second pass, each w_m is a constant."""
    eta = {"image": leaves["lr_image"].detach(), "text": leaves["lr_text"].detach()}
    theta, visited = {n: p.clone() for n, p in start.items()}, []
    total = {m: torch.zeros_like(flat(start, m)) for m in eta}
    for step, index in enumerate(batches):
        visited.append({n: p.requires_grad_() for n, p in theta.items()})
        block = whole_similarity(leaves, alpha)[index][:, index].detach()
        value = loss(visited[-1], leaves["images"][index].detach(), leaves["texts"][index].detach(), block, step)
        grads = dict(zip(theta, torch.autograd.grad(value, list(visited[-1].values())), strict=True))
        theta = {n: p.detach() - rate_of(leaves, n).detach() * grads[n] for n, p in theta.items()}
        total = {m: t + flat(grads, m) for m, t in total.items()}
    w = {m: eta[m] * (flat(target, m) - flat(start, m)) + eta[m] ** 2 * total[m] for m in eta}
    scale = weights(start, target, merged)
    learned = [n for n in leaves if not n.startswith("lr_")]
    result = {n: torch.zeros_like(t) for n, t in leaves.items()}
    for step, index in enumerate(batches):
        block = whole_similarity(leaves, alpha)[index][:, index]
        value = loss(visited[step], leaves["images"][index], leaves["texts"][index], block, step)
        grads = torch.autograd.grad(value, list(visited[step].values()), create_graph=True)
        g = dict(zip(start, grads, strict=True))
        c = sum(2 * (w[m] / scale[m] * flat(g, m)).sum() for m in w)
        for n, d in zip(learned, torch.autograd.grad(c, [leaves[n] for n in learned], allow_unused=True), strict=True):
            result[n] += 0 if d is None else d
    scale = weights(start, target, merged if merged_rates is None else merged_rates)
    for m in eta:
        delta = flat(start, m) - flat(target, m) - eta[m] * total[m]
        result[f"lr_{m}"] = -2 * (delta * total[m]).sum() / scale[m]
    return result


def outer_loop(begun, rule, gradient_of, iterations):
    """Run torch's SGD on every tensor with gradients `gradient_of(leaves, iteration)`; return tensors per iteration."""
    leaves = {n: t.clone().double().requires_grad_() for n, t in begun.tensors().items()}
    rates = {"images": rule.lr_image, "texts": rule.lr_text, "lr_image": rule.lr_lr, "lr_text": rule.lr_lr}
    groups = [{"params": [t], "lr": rates.get(n, rule.lr_similarity)} for n, t in leaves.items()]
    optimiser = torch.optim.SGD(groups, lr=0.0, momentum=rule.momentum)
    states = []
    for iteration in range(iterations):
        for n, g in gradient_of(leaves, iteration).items():
            leaves[n].grad = g.detach().clone()
        optimiser.step()
        states.append({n: t.detach().clone() for n, t in leaves.items()})
    return states


def fast_loop(made, iterations):
    """Run `iterations` updates with the real `outer_step` of `rmdd.distill`; return the state after each of them."""
    states = [State.begin(made.begun)]
    for iteration in range(iterations):
        result = made.matcher.gradient(states[-1].raw, made.matcher.draw(iteration))
        states.append(outer_step(states[-1], result.gradient, made.run.distill))
    return states[1:]


def assert_same_states(states, expected):
    for state, wanted in zip(states, expected, strict=True):
        for name, t in state.raw.tensors().items():
            torch.testing.assert_close(t, wanted[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert all(not torch.equal(t, expected[0][n]) for n, t in expected[-1].items()), (
        "no tensor changed, so nothing is compared"
    )


def assert_equals_slow(made, gradient_of, iterations=3):
    """Assert that the real loop and the slow loop with `gradient_of(leaves, drawn)` give the same sets."""

    def gradient(leaves, iteration):
        return gradient_of(leaves, made.matcher.draw(iteration))

    assert_same_states(fast_loop(made, iterations), outer_loop(made.begun, made.run.distill, gradient, iterations))
