"""Several workers that train one expert together: DDP, or DeepSpeed's ZeRO if the towers do not fit on one worker.

Symbols: B pairs in a batch, b of them on this worker (rank), D joint width. Every rank embeds its b pairs. All ranks
gather the B embeddings and compute the loss of the full batch, so each pair is compared with all B - 1 negatives. Each
rank differentiates only through its b pairs. The gradients of all ranks add up to the gradient of a single worker,
apart from rounding and from dropout masks, which each rank draws itself. Only the first rank uses the store.
"""

import os
import queue
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from rmdd import config
from rmdd.execution.tasks import GroupMember, Hooks
from rmdd.experts.train import ExpertTrainer, TrainingGroup, optimiser_of
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.image import ConvNet
from rmdd.models.losses import infonce

LOCALHOST = "127.0.0.1"
_current_group: "list[ProcessGroup]" = []
"""The process group that this process has joined, as a list with one element; empty before the process joins."""


class ProcessGroup(TrainingGroup):
    """A torch process group of workers, seen from one of these workers."""

    def __init__(self, strategy: str, rank: int, size: int, device: torch.device):
        self.strategy, self.rank, self.size, self.device = strategy, rank, size, device

    def from_leader(self, value: int) -> int:
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)

    def trainer(
        self, model: DualEncoder, rule: config.Experts, momentum: Params, device: torch.device
    ) -> ExpertTrainer:
        batch_norm = nn.modules.batchnorm._BatchNorm
        if any(isinstance(m, batch_norm) and m.training for m in model.train().modules()):
            raise ValueError(
                "the image tower has batch normalisation, and each worker would compute its statistics on a part of "
                "the batch; set experts.worker_group.workers to 1, or use a tower without batch normalisation"
            )
        if self.strategy == "ddp":
            return DdpTrainer(model.to(device), rule, momentum, self)
        return ZeroTrainer(model, rule, momentum, self)


class Towers(nn.Module):
    """A module that embeds images and texts in one forward call; DDP and DeepSpeed require a single call per step."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(
        self, images: Float[Tensor, "b C H W"], texts: Float[Tensor, "b F"]
    ) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
        return self.model.embed_images(images), self.model.embed_texts(texts)


class DdpTrainer(ExpertTrainer):
    """Trains the towers with torch's DistributedDataParallel."""

    def __init__(self, model: DualEncoder, rule: config.Experts, momentum: Params, group: ProcessGroup):
        self.group = group
        self.wrapped: nn.Module = nn.parallel.DistributedDataParallel(Towers(model))  # DDP sends the leader's weights
        super().__init__(model, rule, self._spread(model, momentum))

    def step(self, images: Float[Tensor, "B C H W"], texts: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
        u, v = (gathered(share, self.group.rank, self.group.size) for share in self.wrapped(images, texts))
        loss = infonce(self.model.scores(u, v), torch.eye(len(u), device=u.device))
        self._descend(loss * self.group.size)  # DDP averages gradients over ranks, but we need the sum
        return loss.detach()

    def _descend(self, loss: Float[Tensor, ""]) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def _spread(self, model: DualEncoder, momentum: Params) -> Params:
        """Return the leader's momentum buffers on every rank."""
        if not self.group.from_leader(len(momentum)):
            return {}
        shapes = {n: p for n, p in model.named_parameters() if p.requires_grad}
        buffers = {n: momentum[n].to(p.device) if n in momentum else torch.zeros_like(p) for n, p in shapes.items()}
        for buffer in buffers.values():
            dist.broadcast(buffer, 0)
        return buffers


class ZeroTrainer(DdpTrainer):
    """Trains the towers with DeepSpeed's ZeRO stage 1, 2 or 3. It uses torch's SGD, so DeepSpeed compiles nothing."""

    def __init__(self, model: DualEncoder, rule: config.Experts, momentum: Params, group: ProcessGroup):
        deepspeed = _deepspeed()
        self.group, self.model = group, model
        self.gathered_parameters = deepspeed.zero.GatheredParameters
        stage = int(group.strategy[-1])
        settings = {
            "train_micro_batch_size_per_gpu": -(-rule.batch // group.size),
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # 0 turns clipping off; DeepSpeed's default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        towers = Towers(model)
        if stage == 3:  # partition one weight at a time, so the full model is never on one device
            deepspeed.zero.Init(module=towers, config_dict_or_path=settings, dtype=torch.float32)
            for buffer in model.buffers():
                buffer.data = buffer.to(group.device)
            if isinstance(model.image_tower, ConvNet):  # ConvNet.forward reads these parameters of its submodules
                for p in model.image_tower.blocks[1::4].parameters():
                    deepspeed.zero.register_external_parameter(model.image_tower, p)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.wrapped, self.optimiser, _, _ = deepspeed.initialize(
            model=towers, model_parameters=trained, optimizer=optimiser_of(model, rule), config=settings
        )

    def _descend(self, loss: Float[Tensor, ""]) -> None:
        engine: Any = self.wrapped
        engine.backward(loss)
        engine.step()

    def trained(self) -> Params:
        """Return the complete weights of both towers; every rank must call this function."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        with self.gathered_parameters([p for _, p in named]):
            return {n: p.detach().clone() for n, p in named}

    def momentum(self) -> Params:
        return {}


def gathered(share: Float[Tensor, "b D"], rank: int, size: int) -> Float[Tensor, "B D"]:
    """Gather the embeddings of all ranks, in rank order; gradients flow only to the part of this rank."""
    lengths = [torch.zeros((), dtype=torch.int64, device=share.device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor(len(share), device=share.device))
    longest = int(torch.stack(lengths).max())
    padded = torch.zeros((longest, share.shape[1]), dtype=share.dtype, device=share.device)
    padded[: len(share)] = share.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([share if r == rank else parts[r][: int(lengths[r])] for r in range(size)])


def join_group(member: GroupMember, strategy: str, device: torch.device) -> ProcessGroup:
    """Join the process group of `member`; the process stays in the group for all experts that it trains."""
    if not _current_group:
        if dist.is_initialized():  # Ray Train has already put all workers in one group
            dist.destroy_process_group()
        if member.rank == 0:
            store = dist.TCPStore(member.host, 0, member.size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
            member.meet(f"{member.host} {store.port}")
        else:
            host, port = member.meet(None).split()
            store = dist.TCPStore(host, int(port), member.size, is_master=False)  # type: ignore[attr-defined]
        local_rank = torch.cuda.current_device() if device.type == "cuda" else member.rank
        os.environ.update(RANK=str(member.rank), WORLD_SIZE=str(member.size), LOCAL_RANK=str(local_rank))
        os.environ.setdefault("MASTER_ADDR", member.host)
        os.environ.setdefault("MASTER_PORT", str(store.port))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=member.rank, world_size=member.size)
        _current_group.append(ProcessGroup(strategy, member.rank, member.size, device))
    return _current_group[0]


def run_in_processes(task: Callable[[Any, Hooks], bool], item: Any, hooks: Hooks, size: int, threads: int) -> bool:
    """Run `task(item, hooks)` in `size` processes (ranks) on this machine; return whether all ranks completed the task.

    If a rank fails, the other ranks are ended. Raises `ValueError` if a rank raised a `ValueError`, otherwise
    `RuntimeError` with the error of the first failed rank.
    """
    context = torch.multiprocessing.get_context("spawn")
    addresses, messages, stop = context.Queue(), context.Queue(), context.Event()
    ranks = [
        context.Process(target=_rank, args=(task, item, rank, size, threads, addresses, messages, stop), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, bool] = {}
    try:
        while len(results) < size:
            if hooks.should_stop():
                stop.set()
            try:
                kind, rank, value = messages.get(timeout=0.2)
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in results]
                if dead:
                    code = ranks[dead[0]].exitcode
                    raise RuntimeError(f"worker {dead[0]} of {size} died (exit code {code})") from None
                continue
            if kind == "report":
                hooks.report(value)
            elif kind == "failed":
                raise ValueError(value) if rank < 0 else RuntimeError(value)
            else:
                results[rank] = value
        return all(results.values())
    finally:
        for process in ranks:
            process.join(timeout=5.0 if len(results) == size else 0.0)
            process.kill()


def _rank(
    task: Callable[[Any, Hooks], bool],
    item: Any,
    rank: int,
    size: int,
    threads: int,
    addresses: Any,
    messages: Any,
    stop: Any,
) -> None:
    def meet(address: str | None) -> str:
        for _ in range(size - 1 if address else 0):
            addresses.put(address)
        return address or addresses.get()

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    hooks = Hooks(
        lambda metrics: messages.put(("report", rank, metrics)), stop.is_set, GroupMember(rank, size, LOCALHOST, meet)
    )
    try:
        messages.put(("done", rank, task(item, hooks)))
    except Exception as error:
        messages.put(("failed", -1 if isinstance(error, ValueError) else rank, str(error) or type(error).__name__))


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        raise ValueError(
            "experts.worker_group.strategy zero1, zero2 and zero3 need DeepSpeed: pip install 'rmdd[deepspeed]', or "
            "set ddp"
        ) from None
    if not torch.cuda.is_available():  # otherwise DeepSpeed compiles an extension that we do not use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed
