"""Train one expert and record its trajectory (the teacher protocol of MTT-VL, LoRS and PTM-ST).

One epoch visits every caption record once, shuffled, and drops the last short batch. InfoNCE with identity
targets, plain SGD. Two captions of one image in a batch count as negatives of each other, as in the papers.
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
    """Create the store that all experts of `run` go to, or open it if it is there."""
    model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, text_width)
    alike = run.model.image.weights != "random"
    shared = {n: p for n, p in model.trained().items() if alike and n.startswith("image_tower.")}
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
    """The epochs that stay in the store, for runs with these endpoints; None for all."""
    if isinstance(experts.keep, str):
        return None if experts.keep == "all" else endpoints
    return tuple(sorted(set(experts.keep)))


def expert_model(model: config.Model, image_size: int, seed: int, expert: int, text_width: int) -> DualEncoder:
    """The dual encoder that expert number `expert` starts from; `seed` is that of the experts."""
    return build(model, text_width, image_size, seed, "expert", expert)


class ExpertTrainer:
    """A model and its optimiser in one process. A `TrainingGroup` of several workers has trainers of its own."""

    def __init__(self, model: DualEncoder, rule: config.Experts, momentum: Params):
        self.model = model
        self.optimiser = optimiser_of(model, rule)
        for name, p in model.named_parameters():
            if name in momentum:
                self.optimiser.state[p]["momentum_buffer"] = momentum[name].to(p.device).clone()

    def step(self, images: Float[Tensor, "B C H W"], texts: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
        """Take one step; the loss before it."""
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
    """The workers that train one expert: here one. Several, of `rmdd.experts.worker_group`, agree with the leader."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agreed(self, value: int) -> int:
        """The leader's value."""
        return value

    def trainer(
        self, model: DualEncoder, rule: config.Experts, momentum: Params, device: torch.device
    ) -> ExpertTrainer:
        """Takes the model to the device; the leader's weights and momentum count."""
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
    """Train until complete or told to stop; goes on after the last finished epoch. Returns whether complete.

    `score` gives the val R@mean of a model on `device`.

    Stopping loses the unfinished epoch, which begins again from its start. In a group every worker calls this, and
    the leader reads and writes the store.
    """
    group, rule = group or TrainingGroup(), run.experts
    if group.agreed(int(store.is_complete(expert))):
        return True
    writer = Writer(store, expert) if group.leads else None
    done = group.agreed(writer.epoch if writer else 0)
    seed = run.seed_of("experts")
    model = expert_model(run.model, run.data.image_size, seed, expert, train.texts.shape[1])
    if writer and done >= 0:
        model.load_trained(writer.params)
    trainer = group.trainer(model, rule, writer.momentum if writer else {}, device)
    counted = writer.counts if writer else {}
    counter = ForgettingCounter.of(rule, seed, train, counted) if rule.forgetting else None

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
    stop = should_stop if group.size == 1 else lambda: bool(group.agreed(int(should_stop())))
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
            writer.enter(writer.folder / forgetting.FILE)
        writer.finish()
    return True


class ForgettingCounter:
    """Counts what an expert forgets; see `rmdd.coresets.forgetting`. It changes nothing in the training."""

    def __init__(self, train: PreparedSplit, pool: np.ndarray, counts: forgetting.ForgettingCounts):
        self.train, self.pool, self.counts = train, pool, counts

    @classmethod
    def of(cls, rule: config.Experts, seed: int, train: PreparedSplit, counted: Params) -> "ForgettingCounter":
        """A counter that goes on from the tensors in `counted`."""
        records = len(train.split.image_of)
        pool = forgetting.pool_of(train.split.image_of, rule.forgetting, seed)
        facts = {"pool": len(pool), "epochs": rule.epochs, "records": records}
        counts = forgetting.ForgettingCounts.of(counted) if counted else forgetting.ForgettingCounts.new(records)
        return cls(train, pool, replace(counts, facts=facts))

    def visit(self, model: DualEncoder, device: torch.device, epoch: int) -> None:
        lead = forgetting.margins(model, self.train, self.pool, device)
        self.counts = self.counts.visited(epoch, lead > forgetting.MARGIN, lead)


def _pass(
    epoch: Epoch,
    images: Iterator[Tensor],
    trainer: ExpertTrainer,
    train: PreparedSplit,
    device: torch.device,
    should_stop: Callable[[], bool],
    rank: int,
) -> float | None:
    """One pass over the caption records; its mean loss, or None when told to stop, which loses the unfinished pass."""
    trainer.model.train()
    total = torch.zeros((), device=device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        seed, *index = epoch.key
        torch.manual_seed(derive(seed, "expert dropout", *index, *([rank] if rank else [])))
        torch.empty((), dtype=torch.int64).random_()  # a loader once drew its seed here, and masks follow it
        for records, batch in zip(epoch.records, images, strict=True):
            if should_stop():
                return None
            texts = torch.from_numpy(np.ascontiguousarray(train.texts[records]))
            pixels = normalise(batch.to(device, non_blocking=True), train.mean, train.std)
            total += trainer.step(pixels, texts.to(device, non_blocking=True))
    return float(total) / len(epoch.records)


def optimiser_of(model: DualEncoder, rule: config.Experts) -> torch.optim.SGD:
    """SGD with a rate for each side."""
    rates = {"image": rule.lr_image, "text": rule.lr_text}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if tower_of(n) == tower], "lr": lr} for tower, lr in rates.items()]
    return torch.optim.SGD(groups, lr=rule.lr_image, momentum=rule.momentum, weight_decay=rule.weight_decay)
