"""Tasks that the ranks of a worker group run in tests; a separate module, because the started processes import it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rmdd import config
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.evaluate.students import score
from rmdd.execution.tasks import Hooks
from rmdd.experts import worker_group
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model, train_expert
from rmdd.models.losses import infonce
from rmdd.models.prepared import PreparedSplit

SIZE, WIDTH, IMAGES, CAPTIONS = 8, 6, 11, 2
CPU = torch.device("cpu")


def run_of(**experts: Any) -> config.Run:
    rule = {"num": 1, "epochs": 3, "batch": 5, "keep": "all", "lr_image": 0.05, "lr_text": 0.02}
    image = config.ImageTower(name="convnet", weights="random", widths=(4,), groups=2, projection="linear")
    return config.Run(
        seed=5,
        data=config.Data(image_size=SIZE),
        model=config.Model(image=image, text=config.TextTower(name="hashing"), width=6, dropout=0.0, temperature=0.3),
        experts=config.Experts(augment=config.NO_AUGMENT, **{**rule, **experts}),
        distill=config.Distill(phases=(config.Phase(pairs=20, stop=1, endpoint=1),)),
    )


def prepared_split() -> PreparedSplit:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (IMAGES, 3, SIZE, SIZE)).astype(np.uint8)
    image_of = np.repeat(np.arange(IMAGES), CAPTIONS)
    texts = random.standard_normal((len(image_of), WIDTH)).astype(np.float32)
    names = [str(i) for i in range(IMAGES)]
    dataset = Dataset(Path(), {})
    split = Split("train", pictures, ["a"] * len(image_of), image_of, names, {}, dataset, np.arange(IMAGES), Path())
    return PreparedSplit(split, texts, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def train(item: tuple[Path, config.Run], hooks: Hooks) -> bool:
    path, run = item
    group = worker_group.join_group(hooks.member, run.experts.worker_group.strategy, CPU) if hooks.member else None
    data = prepared_split()
    return train_expert(
        run,
        0,
        Store.open(path),
        data,
        lambda model: score(model, data, CPU).mean,
        CPU,
        hooks.report,
        hooks.should_stop,
        loader_workers=0,
        group=group,
    )


def die(item: Path, hooks: Hooks) -> bool:
    """Raise an error on the second rank while the first rank waits for the second."""
    worker_group.join_group(hooks.member, "ddp", CPU)
    if hooks.member.rank == 1:
        raise ValueError("rank one fails on purpose")
    dist.barrier()
    return True


def exact(item: None, hooks: Hooks) -> bool:
    """Check in float64 that the gradients of two ranks, with 3 and 2 pairs, sum to the gradient of all 5 pairs."""
    group = worker_group.join_group(hooks.member, "ddp", CPU)
    model = expert_model(run_of().model, run_of().data.image_size, run_of().seed_of("experts"), 0, WIDTH).double()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, SIZE, SIZE, generator=draw, dtype=torch.float64)
    texts = torch.randn(5, WIDTH, generator=draw, dtype=torch.float64)
    wanted = infonce(model(images, texts), torch.eye(5))
    whole = torch.autograd.grad(wanted, list(model.parameters()))
    mine = [3, 2][group.rank]
    own = slice(0, 3) if group.rank == 0 else slice(3, 5)
    u, v = model.embed_images(images[own]), model.embed_texts(texts[own])
    assert len(u) == mine
    loss = infonce(
        model.scores(worker_group.gathered(u, group.rank, 2), worker_group.gathered(v, group.rank, 2)), torch.eye(5)
    )
    parts = torch.autograd.grad(loss, list(model.parameters()))
    for part, full in zip(parts, whole, strict=True):
        dist.all_reduce(part)
        torch.testing.assert_close(part, full, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    return True
