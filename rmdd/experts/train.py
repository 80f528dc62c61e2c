"""Train one expert and record its trajectory (the teacher protocol of MTT-VL, LoRS and PTM-ST).

An epoch visits the caption records once, in shuffled order; a shorter last batch is dropped. The loss is InfoNCE with
identity targets, and the optimiser is plain SGD. As in the papers, two captions of the same image in a batch count as
negatives of each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.core.seeding import derive
from rmdd.coresets import forgetting
from rmdd.data.images import normalise
from rmdd.experts.feed import Epoch, Stream, pictures
from rmdd.experts.store import Store, Writer
from rmdd.models.dual import DualEncoder, Params, build, tower_of
from rmdd.models.losses import infonce
from rmdd.models.prepared import PreparedSplit


def begin_store(run: config.Run, path: Path, text_width: int, facts: dict[str, Any]) -> Store:
    """Create the store for all experts of `run`, or open it if it exists."""
    model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, text_width)
    pretrained = run.model.image.weights != "random"
    shared = {n: p for n, p in model.trained().items() if pretrained and n.startswith("image_tower.")}
    return Store.create(
        path,
        {n: tuple(p.shape) for n, p in model.trained().items()},
        shared=shared,
        epochs=run.experts.epochs,
        keep=kept_epochs(run.experts, run.endpoints),
        dtype=run.experts.dtype,
        facts=facts,
    )


def kept_epochs(experts: config.Experts, endpoints: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the epochs that a store keeps for runs whose phases end at `endpoints`; None means all epochs."""
    if isinstance(experts.keep, str):
        return None if experts.keep == "all" else endpoints
    return tuple(sorted(set(experts.keep)))


def expert_model(model: config.Model, image_size: int, seed: int, expert: int, text_width: int) -> DualEncoder:
    """Build the initial dual encoder of expert number `expert`; `seed` is the experts' seed of the run."""
    return build(model, text_width, image_size, seed, "expert", expert)


class ExpertTrainer:
    """Trains one model in one process; subclasses in `rmdd.experts.worker_group` use several processes."""

    def __init__(self, model: DualEncoder, rule: config.Experts, momentum: Params):
        self.model = model
        self.optimiser = optimiser_of(model, rule)
        for name, p in model.named_parameters():
            if name in momentum:
                self.optimiser.state[p]["momentum_buffer"] = momentum[name].to(p.device).clone()

    def step(self, images: Float[Tensor, "B C H W"], texts: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
        """Take one optimiser step; return the loss before the step."""
        loss = infonce(self.model(images, texts), torch.eye(len(images), device=images.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def trained(self) -> Params:
        return self.model.trained()

    def momentum(self) -> Params:
        state = self.optimiser.state
        buffers = {n: state[p].get("momentum_buffer") for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: b for n, b in buffers.items() if b is not None}


class TrainingGroup:
    """The workers that train one expert. This class has one worker; `rmdd.experts.worker_group` has more."""

    rank, size = 0, 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def from_leader(self, value: int) -> int:
        """Return the leader's `value` on every worker."""
        return value

    def trainer(
        self, model: DualEncoder, rule: config.Experts, momentum: Params, device: torch.device
    ) -> ExpertTrainer:
        """Return a trainer of `model` on `device`; every worker gets the weights and the momentum of the leader."""
        return ExpertTrainer(model.to(device), rule, momentum)


def train_expert(
    run: config.Run,
    expert: int,
    store: Store,
    train: PreparedSplit,
    score: Callable[[DualEncoder], float],
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    loader_workers: int = 0,
    stream: Stream | None = None,
    group: TrainingGroup | None = None,
) -> bool:
    """Train an expert until it is complete or `should_stop` returns true; return whether it is complete.

    Training resumes after the last finished epoch; an unfinished epoch is repeated. `score` computes the val R@mean of
    a model on `device`. In a group of workers, all workers call this function, but only the leader uses the store.
    """
    group, rule = group or TrainingGroup(), run.experts
    if group.from_leader(int(store.is_complete(expert))):
        return True
    writer = Writer(store, expert) if group.is_leader else None
    done = group.from_leader(writer.epoch if writer else 0)
    seed = run.seed_of("experts")
    model = expert_model(run.model, run.data.image_size, seed, expert, train.texts.shape[1])
    if writer and done >= 0:
        model.load_trained(writer.params)
    trainer = group.trainer(model, rule, writer.momentum if writer else {}, device)
    counts = writer.counts if writer else {}
    counter = ForgettingCounter.of(rule, seed, train, counts) if rule.forgetting else None

    def record(metrics: dict[str, Any], momentum: Params) -> None:
        params = trainer.trained()
        if writer:
            writer.check_finite(params)
        metrics["val"] = score(model)
        if counter and done >= 0:
            counter.visit(model, device, done + 1)
        if writer:
            writer.add(params, metrics, momentum, counter.counts.tensors() if counter else None)

    if done < 0:
        record({}, {})
        done = 0
    stop = should_stop if group.size == 1 else lambda: bool(group.from_leader(int(should_stop())))
    while done < rule.epochs:
        epoch = Epoch.of(rule, seed, train.split.image_of, expert, done).share(group.rank, group.size)
        images = pictures(train, epoch, run.data, rule.augment, run.runtime.cache_gb, loader_workers, stream)
        loss = _pass(epoch, images, trainer, train, device, stop, group.rank)
        if loss is None:
            return False
        record({"loss": loss}, trainer.momentum())
        done += 1
        if writer:
            on_epoch({"expert": expert, **writer.metrics[-1]})
    if writer:
        if counter:
            counter.counts.save(writer.folder)
            writer.list_file(writer.folder / forgetting.FILE)
        writer.finish()
    return True


class ForgettingCounter:
    """Counts forgetting events while an expert trains (`rmdd.coresets.forgetting`), without changing the training."""

    def __init__(self, train: PreparedSplit, pool: np.ndarray, counts: forgetting.ForgettingCounts):
        self.train, self.pool, self.counts = train, pool, counts

    @classmethod
    def of(cls, rule: config.Experts, seed: int, train: PreparedSplit, earlier: Params) -> "ForgettingCounter":
        """Return a counter that starts with the saved counts `earlier`, or with zeros if `earlier` is empty."""
        records = len(train.split.image_of)
        pool = forgetting.pool_of(train.split.image_of, rule.forgetting, seed)
        facts = {"pool": len(pool), "epochs": rule.epochs, "records": records}
        counts = forgetting.ForgettingCounts.of(earlier) if earlier else forgetting.ForgettingCounts.new(records)
        return cls(train, pool, replace(counts, facts=facts))

    def visit(self, model: DualEncoder, device: torch.device, epoch: int) -> None:
        """Update the forgetting counts with the predictions of the model after `epoch`."""
        margins = forgetting.margins(model, self.train, self.pool, device)
        self.counts = self.counts.visited(epoch, margins > forgetting.MARGIN, margins)


def _pass(
    epoch: Epoch,
    images: Iterator[Tensor],
    trainer: ExpertTrainer,
    train: PreparedSplit,
    device: torch.device,
    should_stop: Callable[[], bool],
    rank: int,
) -> float | None:
    """Train the expert for one epoch; return its mean loss, or None if `should_stop` ended the epoch early."""
    trainer.model.train()
    total = torch.zeros((), device=device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        seed, *index = epoch.key
        torch.manual_seed(derive(seed, "expert dropout", *index, *([rank] if rank else [])))
        torch.empty((), dtype=torch.int64).random_()  # kept from old versions, so dropout masks are equal
        for records, batch in zip(epoch.records, images, strict=True):
            if should_stop():
                return None
            texts = torch.from_numpy(np.ascontiguousarray(train.texts[records]))
            pixels = normalise(batch.to(device, non_blocking=True), train.mean, train.std)
            total += trainer.step(pixels, texts.to(device, non_blocking=True))
    return float(total) / len(epoch.records)


def optimiser_of(model: DualEncoder, rule: config.Experts) -> torch.optim.SGD:
    """Return SGD with one learning rate for the image tower and one for the text tower."""
    rates = {"image": rule.lr_image, "text": rule.lr_text}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if tower_of(n) == tower], "lr": lr} for tower, lr in rates.items()]
    return torch.optim.SGD(groups, lr=rule.lr_image, momentum=rule.momentum, weight_decay=rule.weight_decay)
