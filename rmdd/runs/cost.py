"""Estimates of a run's parameters, disk, memory and time for `rmdd check`. No file is written or downloaded.

FLOPs are counted on the run's own model, built with random weights on PyTorch's meta device, which computes nothing.
Seconds are a rough estimate that assumes a throughput. Bytes on disk are exact for the file formats.
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
from rmdd.config.order import pairs_of_stages
from rmdd.data import sources
from rmdd.data.inputs import input_path
from rmdd.data.plan import make_plan
from rmdd.data.shards import Dataset
from rmdd.data.source import SampleSource
from rmdd.distill.chain import segment_ends, students_of_paths
from rmdd.distill.loop import snapshot_iterations
from rmdd.distill.trajectory.frozen import CHUNK
from rmdd.evaluate.references import reference_of
from rmdd.methods.distribution import DistributionMethod, Effort
from rmdd.models.dual import DualEncoder, build, tower_of
from rmdd.models.losses import LOSSES
from rmdd.models.text import text_width
from rmdd.runs.gate import is_gated, orders_at_gate
from rmdd.runs.paths import training_of_path_starts

FLOAT = 4
GPU_FLOPS = 10e12
CPU_FLOPS = 30e9
"""Assumed float32 FLOP/s of one GPU (`GPU_FLOPS`) and of one CPU thread (`CPU_FLOPS`) on typical towers."""

GRAPH = 1.2
"""Peak memory of double backward, divided by the bytes autograd saves: 0.9 for ViT and NFNet, 1.5 for small
ConvNets."""

KNOWN_WIDTHS = {"bert-base-uncased": 768, "distilbert-base-uncased": 768, "BAAI/bge-base-en-v1.5": 768}
PUBLISHED_COUNTS = {
    "flickr30k": {"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)},
    "flickr8k": {"train": (6_000, 30_000), "val": (1_000, 5_000), "test": (1_000, 5_000)},
    "coco": {"train": (113_287, 566_747), "val": (5_000, 25_010), "test": (5_000, 25_010)},
    "textcaps": {"train": (19_758, 98_790), "val": (2_195, 10_975), "test": (3_166, 15_830)},
    "cc3m": {"train": (357_225, 357_225), "val": (119_075, 119_075), "test": (119_075, 119_075)},
}
Counts = dict[str, tuple[int, int]]
"""Mapping from a split to its number of images and its number of captions."""


@dataclass(frozen=True)
class Size:
    """Numbers of parameters of a dual encoder (an image tower and a text tower)."""

    image: int
    """Number of trained parameters of the image tower and its projection."""
    text: int
    """Number of trained parameters of the text projection."""
    frozen: int
    """Number of parameters that are not trained."""
    shared: int
    """Number of trained parameters that start from the same pretrained values in every expert."""

    @property
    def trained(self) -> int:
        return self.image + self.text


@dataclass(frozen=True)
class Work:
    """FLOPs and autograd memory of a run's dual encoder. Fields for trajectory matching are 0 in other methods."""

    forward: int
    """FLOPs of a forward pass, per pair."""
    training: int
    """FLOPs of a training step (forward and backward), per pair."""
    matching: int
    """FLOPs of one inner step of trajectory matching, with its double backward, for a whole mini-batch."""
    features: int
    """FLOPs of a frozen image tower (forward and backward) in trajectory matching, per pair and outer iteration."""
    tower_graph_bytes: int
    """Bytes that autograd saves for one chunk of images in a frozen image tower."""
    graph_bytes: int
    """Bytes that autograd saves for one inner step of trajectory matching."""
    gradient: int = 0
    """FLOPs of the gradient for one distilled pair (forward and backward pass); 0 in trajectory matching."""
    pair_graph_bytes: int = 0
    """Bytes that autograd saves to compute the gradient for one distilled pair; 0 in trajectory matching."""


def text_features(tower: config.TextTower) -> tuple[int, str | None]:
    """Return the width of the text embeddings of `tower`. If this width is only assumed, also return a remark."""
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
        return 768, f"assuming text width 768, because '{tower.name}' is not in the local cache"


def model_on_meta(run: config.Run, text_width: int) -> DualEncoder:
    """Build the run's dual encoder on PyTorch's meta device. Raises `ValueError` if a tower cannot be built."""
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
    """Return the FLOPs and autograd memory of `model` (on the meta device), counted on a mini-batch of distilled pairs.

    A frozen image tower is counted on one chunk of images instead.
    """
    batch, size = run.distill.batch, run.data.image_size
    images = torch.empty(batch, 3, size, size, device="meta")
    texts = torch.empty(batch, text_width, device="meta")
    target = torch.empty(batch, batch, device="meta")
    params = {name: p.detach().requires_grad_() for name, p in model.trained().items()}
    loss = LOSSES[run.distill.loss]
    model.train()
    student, features, saved_by_tower, saved = model, 0, _GraphBytes(model), _GraphBytes(model)

    def trained(encoder: DualEncoder) -> int:
        """Count the FLOPs of one training step."""
        with FlopCounterMode(display=False) as counter:
            value = loss(functional_call(encoder, params, (images, texts)), target)
            torch.autograd.grad(value, list(params.values()), allow_unused=True)
        return int(counter.get_total_flops())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(images, texts)
        first = training = trained(model)
        if not methods.find(run.distill.method).unrolls:
            with FlopCounterMode(display=False) as once, saved:
                pairs = [t.requires_grad_() for t in (images, texts)]
                torch.autograd.grad(loss(model(*(t.clone() for t in pairs)), target), pairs)
            gradient, of_pair = once.get_total_flops() // batch, saved.bytes // batch
            return Work(forward.get_total_flops() // batch, training // batch, 0, 0, 0, 0, gradient, of_pair)
        if not run.model.image.trainable:  # inner steps use features computed once per outer iteration
            chunk = min(CHUNK, max(p.pairs for p in run.distill.phases))
            pixels = torch.empty(chunk, 3, size, size, device="meta", requires_grad=True)
            with FlopCounterMode(display=False) as tower_forward, torch.no_grad():
                model.image_tower(pixels)
            with FlopCounterMode(display=False) as tower_backward, saved_by_tower:
                out = model.image_tower(pixels.clone())
                torch.autograd.grad(out.sum(), pixels)
            features = (tower_forward.get_total_flops() + tower_backward.get_total_flops()) // chunk
            student, images = model.on_features(), torch.empty(batch, out.shape[1], device="meta")
            first = trained(student)
        inputs = [t.requires_grad_() for t in (images, texts, target)]
        with FlopCounterMode(display=False) as second, saved:
            # FlopCounterMode hooks the inputs of modules, and hooked inputs must not be leaf tensors
            value = loss(functional_call(student, params, (images.clone(), texts.clone())), target)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
            q = torch.stack([g.sum() for g in grads]).sum()
            variables = inputs + (list(params.values()) if run.distill.estimator == "exact" else [])
            torch.autograd.grad(q, variables, allow_unused=True)
    matching = first + second.get_total_flops()
    return Work(
        forward.get_total_flops() // batch, training // batch, matching, features, saved_by_tower.bytes, saved.bytes
    )


class _GraphBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context manager that adds up the bytes that autograd saves inside the block. Model parameters do not count."""

    def __init__(self, model: DualEncoder):
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._tensors: dict[int, torch.Tensor] = {}
        super().__init__(self._keep, lambda t: t)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for pointer, t in self._tensors.items() if pointer not in self._weights)


def checkpoint_bytes(numbers: int, dtype: str = "float32") -> int:
    return numbers * (FLOAT if dtype == "float32" else FLOAT // 2)


def store_bytes(size: Size, experts: int, epochs_kept: int, dtype: str = "float32") -> int:
    """Return the bytes of an expert store: epoch 0 and `epochs_kept` more checkpoints of each expert.

    Of epoch 0, the `size.shared` parameters that are equal in all experts are stored only once.
    """
    start = FLOAT * (size.trained - size.shared)
    return FLOAT * size.shared + experts * (start + epochs_kept * checkpoint_bytes(size.trained, dtype))


def synthetic_numbers(run: config.Run, text_width: int) -> list[int]:
    """Return the number of values learned in each phase: pixels, text embeddings and similarity parameters."""
    s = run.distill.similarity
    return [cost([p.pairs], run.stored_size, text_width, s.kind, s.rank) for p in run.distill.phases]


def phases_bytes(run: config.Run, text_width: int, size: Size) -> int:
    """Return the bytes on disk of all phases: the initial set, the snapshots and the optimiser state.

    The optimiser state stores three numbers per learned value: the value, its momentum and its average. Methods that
    do not iterate have no optimiser state. Chained phases also store a set per segment, and the starts of paths.
    """
    rule, total = run.distill, 0
    state = 3 if methods.find(rule.method).iterates else 0
    for p, numbers in enumerate(synthetic_numbers(run, text_width)):
        sets = {*snapshot_iterations(rule.phases[p].iterations, rule.snapshots), *segment_ends(rule, p)}
        starts = run.experts.num * len(students_of_paths(rule, p))
        total += FLOAT * numbers * (1 + state + len(sets)) + starts * checkpoint_bytes(size.trained)
    return total


def cache_bytes(run: config.Run, counts: Counts, text_width: int) -> int:
    """Return the bytes of the decoded images (uint8) and text embeddings (float32) of all splits."""
    images, captions = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return images * 3 * run.data.image_size**2 + captions * text_width * FLOAT


def matching_bytes(run: config.Run, size: Size, work: Work, text_width: int) -> int:
    """Return the peak memory, in bytes, of one outer step of trajectory matching on its device (GPU or CPU).

    This memory holds student parameters of inner steps, the autograd graph of inner steps and the synthetic set.
    """
    steps = run.distill.steps
    stored = {"device": steps, "cpu": 0, "recompute": 2 * math.isqrt(steps - 1) + 2}[run.runtime.keep_parameters]
    vectors = stored + 3 + (run.distill.estimator == "exact")
    learnable = max(synthetic_numbers(run, text_width))
    reach = math.isqrt(steps - 1) + 1 if run.runtime.keep_parameters == "recompute" else steps
    graphs = max(1, min(run.distill.reuse_graphs, reach))
    graph = GRAPH * max(
        work.tower_graph_bytes, graphs * work.graph_bytes / (2 if run.distill.precision == "bfloat16" else 1)
    )
    return FLOAT * (vectors * size.trained + size.frozen + 4 * learnable) + round(graph)


def effort_of(run: config.Run, phase: int, records: int) -> Effort:
    """Return how many pairs and models one step of a distribution-matching method uses in phase `phase`."""
    method = methods.method_of(run)
    assert isinstance(method, DistributionMethod)
    return method.effort(phase, records)


def step_bytes(run: config.Run, counts: Counts, size: Size, work: Work, text_width: int) -> int:
    """Return the peak memory, in bytes, of one step of distribution matching.

    This memory holds the models, the synthetic set (with gradient, momentum and average) and the autograd graph.
    """
    efforts = [effort_of(run, p, counts["train"][1]) for p in range(len(run.distill.phases))]
    held = max(e.models for e in efforts) * size.trained + max(e.numbers for e in efforts) + size.frozen
    graph = max(e.at_once for e in efforts) * work.pair_graph_bytes / (2 if run.distill.precision == "bfloat16" else 1)
    return FLOAT * (held + 4 * max(synthetic_numbers(run, text_width))) + round(GRAPH * graph)


def _distilling(run: config.Run, counts: Counts, work: Work) -> int:
    """Return the FLOPs of distilling all phases; 0 for generative methods, whose models are not counted."""
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
        if starts := students_of_paths(run.distill, p):
            rule = training_of_path_starts(run)
            earlier = pairs_of_stages(rule.order, [q.pairs for q in run.distill.phases[:p]])
            passes = rule.epochs * _pairs_of_pass(rule, earlier)
            total += len(starts) * run.experts.num * passes * work.training
    return total


def _learned_at_gates(run: config.Run, subsets: list[int]) -> list[list[int]]:
    """Return the numbers of pairs that each student at the gates of a planned chain learns, stage after stage."""
    if not is_gated(run.distill):
        return []
    counts = range(1, len(subsets) + 1)
    each = [pairs_of_stages(order, subsets[:n]) for n in counts for order in orders_at_gate(n)]
    return each * run.evaluate.selection_students


def _pairs_of_pass(rule: config.Evaluate, subsets: list[int]) -> int:
    """Return the number of pairs that a student sees in one pass over each of the subsets with these sizes."""
    return sum(-(-pairs // rule.batch) * min(rule.batch, pairs) for pairs in subsets)


def operations(run: config.Run, counts: Counts, work: Work) -> dict[str, int]:
    """Return the FLOPs of each step of the run, summed over all experts, phases or students."""
    rule, teach = run.evaluate, run.experts
    records = counts["train"][1]
    val, test = counts["val"][0], counts["test"][0]
    batch = min(teach.batch, records) or 1
    one_epoch = (records // batch) * batch * work.training + val * work.forward
    experts = teach.num * (teach.epochs * one_epoch + val * work.forward)
    subsets = [p.pairs for p in run.distill.phases]
    stages = pairs_of_stages(rule.order, subsets)

    def student(pairs: list[int], passes: int, images_scored: int) -> int:
        return passes * _pairs_of_pass(rule, pairs) * work.training + images_scored * work.forward

    snapshots = max(len(snapshot_iterations(p.iterations, run.distill.snapshots)) for p in run.distill.phases)
    select = rule.selection_students * snapshots if snapshots > 1 else 0
    tune = len(rule.baseline_lrs) * len(rule.baseline_losses) * min(rule.selection_students, rule.baseline_draws)
    curve = len(stages) * (rule.epochs // rule.eval_every) * val
    reference = reference_of(rule, run.distill.method, run.distill.loss, run.student_temperature)
    random_pairs = [run.distill.budget]
    evaluate = (
        select * student(stages, rule.epochs, val)
        + sum(student(pairs, rule.epochs, val) for pairs in _learned_at_gates(run, subsets))
        + tune * student(random_pairs, rule.epochs, val)
        + rule.students * student(stages, rule.epochs, curve + val + test)
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
    """Return the numbers of images and captions per split, and a phrase that says where these numbers come from.

    Only annotation files are read, no images. Raises `ValueError` if the pairs cannot be counted before `rmdd ingest`.
    """
    if data.source == "scenes":
        s = data.scenes
        return {k: (n, 5 * n) for k, n in (("train", s.train), ("val", s.val), ("test", s.test))}, "as configured"
    if data.source == "dataset":
        stored = Dataset.open(data.root or "").counts
        return {k: (c["pairs"], c["captions"]) for k, c in stored.items()}, "from the dataset"
    layout = "textcaps" if data.source == "textcaps" else data.layout
    if layout is not None and not input_path(data.root).is_dir():
        return limited(PUBLISHED_COUNTS[layout], data), f"as published, because data.root {data.root} does not exist"
    if data.source == "huggingface" and (hub := data.huggingface.hub):
        raise ValueError(f"cannot count the pairs of '{hub}' before they are downloaded; run `rmdd ingest` first")
    source = sources.find(data)
    if isinstance(source, SampleSource):
        files = source.files(data)
        rows = source.rows(files, data)
        if rows is None:
            raise ValueError(
                f"cannot count the pairs of {len(files)} {data.source} files, or see whether a split is empty, without "
                "reading them; run `rmdd ingest` with this run file first, then check it again"
            )
    else:
        rows = source.rows(data)[0]
    plan = make_plan(rows, data)
    counts = {k: (len(rows), sum(len(r["captions"]) for r in rows)) for k, rows in plan.pairs.items()}
    return limited(counts, data), "from the annotations; no image was opened"


def limited(counts: Counts, data: config.Data) -> Counts:
    """Return `counts` with at most as many images as `data` allows in each split, and captions in proportion."""

    def cut(split: str, images: int, captions: int) -> tuple[int, int]:
        limit = min(images, data.limit_of(split) or images)
        return limit, captions * limit // images if images else 0

    return {split: cut(split, *both) for split, both in counts.items()}
