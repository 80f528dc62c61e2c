"""The method cards written out plainly, in float64: losses, gradients and the outer loop, with none of the engine."""

import itertools

import torch
import torch.nn.functional as F
from torch.func import functional_call

from rmdd.distill.loop import State, outer_step


def wbce(logits, similarity):
    """LoRS card, section 3: the means over positives and over negatives, halved."""
    p = torch.sigmoid(logits)
    entry = -similarity * torch.log(p + 1e-6) - (1 - similarity) * torch.log(1 - p + 1e-6)
    positive = (similarity > 0.5).double()
    return sum((entry * mask).sum() / (mask.sum() + 1e-6) for mask in (positive, 1 - positive)) / 2


def infonce(logits, similarity):
    """MTT-VL card, step 4: cross entropy both ways, with nothing to learn in the pairing."""
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole_similarity(leaves, alpha):
    """S of all pairs from its tensors; the identity where there are none."""
    if "similarity.matrix" in leaves:
        return leaves["similarity.matrix"]
    identity = torch.eye(len(leaves["texts"]), dtype=torch.float64)
    if "similarity.scale" not in leaves:
        return identity
    left, right = leaves["similarity.left"], leaves["similarity.right"]
    return identity * leaves["similarity.scale"] + alpha / left.shape[1] * left @ right.T


def plain_loss(model, loss):
    """The loss of one inner step: (parameters, images, texts, similarity, step) -> number."""

    def value(theta, images, texts, similarity, step):
        return loss(functional_call(model, theta, (images, texts)), similarity)

    return value


def rate_of(rates, name):
    """The inner rate of one parameter, by the tower it belongs to."""
    return rates["lr_text" if name.startswith("text_head.") else "lr_image"]


def flat(params, tower):
    """All parameters of one tower in one vector."""
    mine = [p.flatten() for n, p in params.items() if n.startswith("text_head.") == (tower == "text")]
    return torch.cat(mine)


def weights(start, target, merged):
    """What divides each tower's squared miss: its own way, or that of both."""
    way = {m: (flat(start, m) - flat(target, m)).square().sum() for m in ("image", "text")}
    return dict.fromkeys(way, sum(way.values())) if merged else way


def segment(made, drawn):
    """Start and target of a draw among the epochs as they were trained."""
    expert = made.matcher.experts[drawn.expert]
    return [made.store.read(expert, drawn.start + ahead) for ahead in (0, 1)]


def shortcut(store, expert, endpoint, epoch):
    """PTM-ST card, section 3.1, at a real epoch: each tensor between epoch 0 and `endpoint` by its share of steps."""
    walk = [store.read(expert, t) for t in range(endpoint + 1)]
    point = {}
    for name in walk[0]:
        steps = [(b[name].float() - a[name].float()).double().norm().item() for a, b in itertools.pairwise(walk)]
        gone = sum(steps[: int(epoch)]) + (epoch - int(epoch)) * (steps[int(epoch)] if epoch < endpoint else 0)
        share = gone / sum(steps) if sum(steps) else 0.0
        point[name] = (1 - share) * walk[0][name] + share * walk[endpoint][name]
    return point


def full_unroll(loss, start, target, leaves, alpha, batches, merged=False):
    """Gradients by every leaf, differentiated through the whole unroll."""
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
    """TESLA card, sections 3-4: 2 w_m / a_m . dg_m/dX with w_m constant, and -2 delta . G / a_m for the rates."""
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
    found = {n: torch.zeros_like(t) for n, t in leaves.items()}
    for step, index in enumerate(batches):
        block = whole_similarity(leaves, alpha)[index][:, index]
        value = loss(visited[step], leaves["images"][index], leaves["texts"][index], block, step)
        grads = torch.autograd.grad(value, list(visited[step].values()), create_graph=True)
        g = dict(zip(start, grads, strict=True))
        c = sum(2 * (w[m] / scale[m] * flat(g, m)).sum() for m in w)
        for n, d in zip(learned, torch.autograd.grad(c, [leaves[n] for n in learned], allow_unused=True), strict=True):
            found[n] += 0 if d is None else d
    scale = weights(start, target, merged if merged_rates is None else merged_rates)
    for m in eta:
        delta = flat(start, m) - flat(target, m) - eta[m] * total[m]
        found[f"lr_{m}"] = -2 * (delta * total[m]).sum() / scale[m]
    return found


def outer_loop(begun, rule, gradient_of, iterations):
    """torch's own SGD on every tensor, `gradient_of(leaves, iteration)` in the place of a backward pass; all states."""
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
    """The states of the loop as it is run."""
    states = [State.begin(made.begun)]
    for iteration in range(iterations):
        found = made.matcher.gradient(states[-1].raw, made.matcher.draw(iteration))
        states.append(outer_step(states[-1], found.gradient, made.run.distill))
    return states[1:]


def assert_same_states(states, expected):
    for state, wanted in zip(states, expected, strict=True):
        for name, t in state.raw.tensors().items():
            torch.testing.assert_close(t, wanted[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert all(not torch.equal(t, expected[0][n]) for n, t in expected[-1].items()), "nothing moved to compare"


def assert_equals_slow(made, gradient_of, iterations=3):
    """The loop as it is run has the states of the outer loop on `gradient_of(leaves, drawn)`."""

    def gradient(leaves, iteration):
        return gradient_of(leaves, made.matcher.draw(iteration))

    assert_same_states(fast_loop(made, iterations), outer_loop(made.begun, made.run.distill, gradient, iterations))
