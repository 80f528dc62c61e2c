"""Train one expert and record its trajectory (the teacher protocol of MTT-VL, LoRS and PTM-ST).

One epoch visits every caption record once, shuffled, and drops the last short batch. InfoNCE with identity
targets, plain SGD. Two captions of one image in a batch count as negatives of each other, as in the papers.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmdd import config
from rmdd.data.augment import augment
from rmdd.data.images import decode, normalise
from rmdd.data.material import Material
from rmdd.evaluate.students import score
from rmdd.experts.store import Store, Writer
from rmdd.models.dual import DualEncoder, Params, build, tower_of
from rmdd.models.losses import infonce
from rmdd.seeding import derive, generator


def begin_store(run: config.Run, path: Path, text_width: int, facts: dict) -> Store:
    """Create the store that all experts of `run` go to, or open it if it is there."""
    model = expert_model(run, 0, text_width)
    alike = run.model.image.weights != "random"
    shared = {n: p for n, p in model.trained().items() if alike and n.startswith("image_tower.")}
    return Store.create(
        path,
        {n: tuple(p.shape) for n, p in model.trained().items()},
        shared=shared,
        epochs=run.experts.epochs,
        keep=kept_epochs(run),
        dtype=run.experts.dtype,
        facts=facts,
    )


def kept_epochs(run: config.Run) -> tuple[int, ...] | None:
    """The epochs that stay in the store; None for all."""
    keep = run.experts.keep
    if isinstance(keep, str):
        return None if keep == "all" else run.endpoints
    return tuple(sorted(set(keep)))


def expert_model(run: config.Run, expert: int, text_width: int) -> DualEncoder:
    """The dual encoder that expert number `expert` starts from."""
    return build(run.model, text_width, run.data.image_size, run.seed_of("experts"), "expert", expert)


def train_expert(
    run: config.Run,
    expert: int,
    store: Store,
    train: Material,
    val: Material,
    device: torch.device,
    on_epoch: Callable[[dict], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    loader_workers: int = 0,
) -> bool:
    """Train until complete or told to stop; goes on after the last finished epoch. Returns whether complete.

    Stopping leaves the epoch at work undone; it is begun again from its start.
    """
    if store.is_complete(expert):
        return True
    rule = run.experts
    writer = Writer(store, expert)
    model = expert_model(run, expert, train.texts.shape[1]).to(device)
    if writer.epoch >= 0:
        model.load_trained(writer.params)
    else:
        writer.add(model.trained(), {"val": _val(model, val, run, device)})
    optimiser = _optimiser(model, rule)
    _restore_momentum(model, optimiser, writer.momentum)
    while writer.epoch < rule.epochs:
        loss = _epoch(run, expert, writer.epoch, model, optimiser, train, device, should_stop, loader_workers)
        if loss is None:
            return False
        writer.check_finite(model.trained())
        writer.add(model.trained(), {"loss": loss, "val": _val(model, val, run, device)}, _momentum(model, optimiser))
        on_epoch({"expert": expert, **writer.metrics[-1]})
    writer.finish()
    return True


def _epoch(
    run: config.Run,
    expert: int,
    epoch: int,
    model: DualEncoder,
    optimiser: torch.optim.SGD,
    train: Material,
    device: torch.device,
    should_stop: Callable[[], bool],
    loader_workers: int,
) -> float | None:
    """One pass over the caption records; its mean loss, or None when told to stop, which leaves the pass undone."""
    rule, seed = run.experts, run.seed_of("experts")
    order = torch.randperm(len(train.split.captions), generator=generator(seed, "expert order", expert, epoch)).numpy()
    batch = min(rule.batch, len(order))
    steps = len(order) // batch
    model.train()
    total = torch.zeros((), device=device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(derive(seed, "expert dropout", expert, epoch))
        feed = Feed(train, order[: steps * batch].reshape(steps, batch), run, (seed, expert, epoch))
        loader = torch.utils.data.DataLoader(feed, batch_size=None, num_workers=loader_workers)
        targets = torch.eye(batch, device=device)
        for images, texts in loader:
            if should_stop():
                return None
            pixels = normalise(images.to(device, non_blocking=True), train.mean, train.std)
            loss = infonce(model(pixels, texts.to(device, non_blocking=True)), targets)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += loss.detach()
    return float(total) / steps


class Feed(torch.utils.data.Dataset):
    """Batches of (uint8 images (B,3,S,S), text embeddings (B,F)) in a given order; what augmentation draws depends
    on the seed, the expert, the epoch and the record alone, so any number of loader workers gives the same bits."""

    def __init__(self, material: Material, order: np.ndarray, run: config.Run, key: tuple[int, int, int]):
        self.material, self.order, self.run, self.key = material, order, run, key

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if step >= len(self.order):
            raise IndexError(step)
        records = self.order[step]
        pictures = self.material.split.image_of[records]
        texts = torch.from_numpy(np.ascontiguousarray(self.material.texts[records]))
        if not self.run.experts.augment.active:
            return torch.from_numpy(self.material.split.images[pictures]), texts
        seed, expert, epoch = self.key
        images = [
            self._augmented(int(picture), generator(seed, "augment", expert, epoch, int(record)))
            for picture, record in zip(pictures, records, strict=True)
        ]
        return torch.from_numpy(np.stack(images)), texts

    def _augmented(self, picture: int, draw: torch.Generator) -> np.ndarray:
        data = self.run.data
        image = decode(
            self.material.split.encoded(picture),
            max_pixels=data.max_pixels,
            background=data.background,
            exif_orientation=data.exif_orientation,
        )
        return augment(image, self.run.experts.augment, data.image_size, draw)


def _optimiser(model: DualEncoder, rule: config.Experts) -> torch.optim.SGD:
    rates = {"image": rule.lr_image, "text": rule.lr_text}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if tower_of(n) == tower], "lr": lr} for tower, lr in rates.items()]
    return torch.optim.SGD(groups, lr=rule.lr_image, momentum=rule.momentum, weight_decay=rule.weight_decay)


def _momentum(model: DualEncoder, optimiser: torch.optim.SGD) -> Params:
    buffers = {n: optimiser.state[p].get("momentum_buffer") for n, p in model.named_parameters() if p.requires_grad}
    return {n: b for n, b in buffers.items() if b is not None}


def _restore_momentum(model: DualEncoder, optimiser: torch.optim.SGD, buffers: Params) -> None:
    for name, p in model.named_parameters():
        if name in buffers:
            optimiser.state[p]["momentum_buffer"] = buffers[name].to(p.device).clone()


def _val(model: DualEncoder, val: Material, run: config.Run, device: torch.device) -> float:
    return score(model, val, device, run.evaluate.chunk).mean
