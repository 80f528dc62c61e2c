"""`rmdd bench step`: time, peak memory and FLOPs of one matching iteration, compared with reference loops.

The variants of the iteration are timed in turn, so that other programs on the machine slow all of them down equally. On
a CPU, a separate process measures the peak memory. It runs one iteration to warm up, resets the high-water mark of its
resident memory (/proc/self/clear_refs, Linux only), runs a second iteration and reads the mark. In this process, glibc
returns each freed tensor at once, so that heap fragmentation does not count. On a GPU, PyTorch reports the peak.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rmdd import config, methods
from rmdd.bench.yardsticks import plain, published, whole_unroll
from rmdd.core import seeding
from rmdd.core.files import write_json
from rmdd.core.threads import torch_threads
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.frozen import features_of, to_pixels
from rmdd.distill.unroll import Engine, forward_suits, meta_gradient
from rmdd.models.dual import TOWERS, build
from rmdd.models.image import matching_context
from rmdd.models.losses import LOSSES

ENGINE_WORDS = {
    "second_pass": ("forward", "reverse"),
    "precision": ("float32", "bfloat16"),
    "trajectory": ("device", "cpu", "recompute"),
}
AS_RUN = Engine(second_pass="forward")
YARDSTICKS = ("whole_unroll", "published", "published_rebuilt")


@dataclass(frozen=True)
class Case:
    """The matching problem to measure: a dual encoder, a synthetic set, and the number of inner steps."""

    tower: str = "convnet"
    widths: tuple[int, ...] = (64, 64, 64)
    image_size: int = 64
    text_width: int = 768
    width: int = 256
    pairs: int = 100
    batch: int = 20
    steps: int = 8
    loss: str = "wbce"
    similarity: Literal["full", "low_rank", "identity"] = "full"
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    threads: int = 2

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss '{self.loss}'; available: {', '.join(LOSSES)}")
        if self.similarity not in ("full", "low_rank", "identity"):
            raise ValueError(f"unknown similarity '{self.similarity}'; available: full, low_rank, identity")
        if not 2 <= self.batch <= self.pairs:
            raise ValueError(f"batch is {self.batch}, but must be from 2 to the number of pairs, {self.pairs}")


@dataclass(frozen=True)
class Variant:
    """One way to compute a matching iteration: a reference loop, or an estimator with engine options."""

    name: str
    method: str | None = None
    """Name of the method whose defaults set loss, similarity, blending and trainable towers; None: `Case` sets them."""
    estimator: Literal["exact", "first_order"] | None = None
    """Gradient estimator; None for a reference loop, which `name` identifies."""
    engine: Engine = AS_RUN


def variants(
    estimators: Sequence[Literal["exact", "first_order"]] = ("first_order", "exact"),
    engines: dict[str, Engine] | None = None,
    yardsticks: Sequence[str] = YARDSTICKS,
    of_methods: Sequence[str] = (),
) -> list[Variant]:
    """Return the variants to measure: reference loops, then, for each method, each estimator with each engine."""
    for name in of_methods:
        if not methods.find(name).unrolls:
            raise ValueError(f"method {name} does not match trajectories, so it has no matching step; remove it")
    chosen = [Variant(y) for y in yardsticks]
    for method in (None, *of_methods):
        for label, engine in (engines or {"": AS_RUN}).items():
            chosen += [Variant(" ".join(filter(None, (method, e, label))), method, e, engine) for e in estimators]
    return chosen


def engine_of(words: str) -> Engine:
    """Parse engine options such as `reverse,bfloat16,recompute`; missing options keep the defaults of a run."""
    options: dict[str, Any] = {"second_pass": "forward"}
    for word in filter(None, words.split(",")):
        if word.startswith("reuse=") and word[6:].isdigit():
            options["reuse"] = int(word[6:])
            continue
        fields = [name for name, choices in ENGINE_WORDS.items() if word in choices]
        if not fields:
            valid = ", ".join([*(w for choices in ENGINE_WORDS.values() for w in choices), "reuse=STEPS"])
            raise ValueError(f"unknown engine option '{word}'; available: {valid}")
        options[fields[0]] = word
    return Engine(**options)


def yardsticks_of(words: str) -> list[str]:
    """Parse the names of reference loops, separated by commas; an empty string gives none."""
    names = [w for w in words.split(",") if w]
    if unknown := [w for w in names if w not in YARDSTICKS]:
        raise ValueError(f"unknown reference loop '{unknown[0]}'; available: {', '.join(YARDSTICKS)}")
    return names


def run_of(case: Case, method: str | None = None) -> config.Run:
    """Return a run for `case`: with the defaults of `method`, or (None) with the loss and similarity of the case."""
    convnet = case.tower == "convnet"
    image: dict[str, Any] = {"name": case.tower, "weights": "random:0", "widths": case.widths}
    image["projection"] = "linear" if convnet else "none"
    plan: dict[str, Any] = {"loss": case.loss, "similarity": {"kind": case.similarity}}
    if method is not None:
        image |= methods.find(method).defaults.get("model", {}).get("image", {})
        plan = {"method": method, "similarity": methods.find(method).defaults.get("distill", {}).get("similarity", {})}
    if plan["similarity"].get("kind") == "low_rank":  # low-rank factors must be smaller than the full matrix
        plan["similarity"] = plan["similarity"] | {"rank": min(10, max(1, (case.pairs - 1) // 2))}
    phase = {"pairs": case.pairs, "start": 0, "stop": 1, "iterations": 1}
    raw = {
        "data": {"image_size": case.image_size},
        "model": {
            "image": image,
            "text": {"name": "hashing", "projection": "block" if image["projection"] != "linear" else "linear"},
            "width": case.width if convnet else None,
            "dropout": 0.0,
        },
        "distill": plan | {"phases": [phase], "batch": case.batch, "steps": case.steps},
    }
    return config.load(raw)


def prepare(case: Case, method: str | None = None) -> Callable[[Variant], Callable[[], tuple[torch.Tensor, Synthetic]]]:
    """Create the tensors of a case; return a function that maps a variant to its iteration, again a function.

    The iteration takes no arguments and returns the matching loss and its gradient for the synthetic set.
    """
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    run = run_of(case, method)
    recipe = methods.matching_method(run)

    def encoder() -> Any:
        return build(run.model, case.text_width, case.image_size, seed=0, who="bench").to(device, dtype).train()

    model = encoder()
    random = seeding.generator(0, "bench")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    start = model.trained()
    target = {n: p + 0.01 * normal(*p.shape) for n, p in start.items()}
    parts = similarity.initial(run.distill.similarity, case.pairs, random)
    synthetic = Synthetic(
        images=normal(case.pairs, 3, case.image_size, case.image_size),
        texts=normal(case.pairs, case.text_width),
        lr_image=torch.tensor(0.1, dtype=dtype, device=device),
        lr_text=torch.tensor(0.1, dtype=dtype, device=device),
        similarity={n: t.to(device, dtype) for n, t in parts.items()},
        alpha=run.distill.similarity.alpha,
    )
    drawn = recipe.draw(0, 0, 1, {tower: (0, 1) for tower in TOWERS})
    batches = drawn.batches.to(device)
    tower = None if run.model.image.trainable else model.image_tower
    bare, loss = plain(model), LOSSES[run.distill.loss]
    inner = recipe.student_loss(model if tower is None else model.on_features(), drawn)
    with matching_context(model):
        inputs = synthetic if tower is None else features_of(tower, synthetic, batches)
        forward = forward_suits(inner, start, inputs, batches[0])

    def iteration(variant: Variant) -> Callable[[], tuple[torch.Tensor, Synthetic]]:
        def step() -> tuple[torch.Tensor, Synthetic]:
            with matching_context(model):
                if variant.name == "whole_unroll":
                    return whole_unroll(bare, loss, start, target, synthetic, batches)
                if variant.estimator is None:
                    rebuilt = variant.name == "published_rebuilt"
                    nets = (lambda: plain(encoder())) if rebuilt else lambda: bare
                    return published(nets, loss, start, target, synthetic, batches)
                engine = variant.engine if forward else replace(variant.engine, second_pass="reverse")
                inputs = synthetic if tower is None else features_of(tower, synthetic, batches)
                result = meta_gradient(
                    inner,
                    start,
                    target,
                    inputs,
                    batches,
                    estimator=variant.estimator,
                    branches=run.distill.branches,
                    engine=engine,
                )
                if tower is not None:
                    result = to_pixels(tower, synthetic, batches, result)
                return result.loss, result.gradient

        return step

    return iteration


def bench_step(
    case: Case, chosen: Sequence[Variant], repeats: int = 20, out: Path | None = None, memory: bool = True
) -> dict[str, Any]:
    """Measure the variants `chosen` on `case`; with `out`, write the result as JSON.

    For each variant, the result has seconds per iteration (median and quartiles), pairs per second, FLOPs, and peak
    bytes above the process's memory before the iteration. Variants without a method compute the same steps as the
    reference loops, so the result also has their ratios to these loops.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, but must be at least 1; use 20 for a reliable median")
    with torch_threads(case.threads):
        rows, out_of_memory = _measure(case, chosen, repeats, memory)
    result = {
        "case": asdict(case),
        "repeats": repeats,
        "out_of_memory": out_of_memory,
        "torch": torch.__version__,
        "variants": rows,
    }
    if out is not None:
        write_json(out, result)
    return result


def _measure(
    case: Case, chosen: Sequence[Variant], repeats: int, memory: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the figures of each variant, and the names of the variants that need more memory than there is."""
    ready = {method: prepare(case, method) for method in dict.fromkeys(v.method for v in chosen)}
    runs = {v.name: ready[v.method](v) for v in chosen}
    rows: dict[str, dict[str, Any]] = {}
    for variant in chosen:
        try:
            runs[variant.name]()
            with _Flops() as counter:  # type: ignore[no-untyped-call]
                runs[variant.name]()
        except torch.OutOfMemoryError:
            del runs[variant.name]
            continue
        rows[variant.name] = {"flops": counter.total}
    out_of_memory = [v.name for v in chosen if v.name not in rows]
    chosen = [v for v in chosen if v.name in rows]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _wait(case.device)
            began = time.perf_counter()
            run()
            _wait(case.device)
            seconds[name].append(time.perf_counter() - began)
    for variant in chosen:
        row, times = rows[variant.name], seconds[variant.name]
        row["seconds"] = statistics.median(times)
        row["quartiles"] = statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2
        row["pairs_per_second"] = case.steps * case.batch / row["seconds"]
        row["peak_bytes"] = peak_bytes(case, variant) if memory else None
    for variant in chosen:
        row = rows[variant.name]
        row["ratios"] = {
            y: {k: row[k] / rows[y][k] for k in ("seconds", "peak_bytes", "flops") if row[k] is not None}
            for y in YARDSTICKS
            if y in rows and variant.method is None
        }
    return rows, out_of_memory


def peak_bytes(case: Case, variant: Variant) -> int:
    """Return the peak bytes of one iteration above the memory of the process before it."""
    if case.device != "cpu":
        run = prepare(case, variant.method)(variant)
        run()
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        run()
        return torch.cuda.max_memory_allocated(case.device) - before
    request = json.dumps({"case": asdict(case), "variant": asdict(variant)})
    command = [sys.executable, "-m", "rmdd.bench.step", request]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"cannot measure the memory of '{variant.name}': {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def table(result: dict[str, Any]) -> str:
    """Return the result of `bench_step` as a text table."""
    rows = result["variants"]
    against = [y for y in YARDSTICKS if y in rows]
    heads = ["variant", "s/iter", "pairs/s", "peak MB", "GFLOP", *(f"time, memory / {y}" for y in against)]
    lines = [heads]
    for name, row in rows.items():
        peak = row["peak_bytes"]
        cells = [name, f"{row['seconds']:.3f}", f"{row['pairs_per_second']:.1f}", f"{peak / 1e6:.0f}" if peak else "-"]
        cells.append(f"{row['flops'] / 1e9:.1f}")
        for y in against:
            ratio = row["ratios"].get(y)
            memory = f"{ratio['peak_bytes']:.2f}" if ratio and "peak_bytes" in ratio else "-"
            cells.append(f"{ratio['seconds']:.2f}, {memory}" if ratio else "-")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    lines += [[f"{name}: out of memory"] + [""] * (len(heads) - 1) for name in result["out_of_memory"]]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


class _Flops(TorchDispatchMode):
    """Counter of the FLOPs of matrix products and convolutions, with PyTorch's formulas.

    `FlopCounterMode` cannot be used, because its module hooks conflict with `torch.autograd.grad` for parameters.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **kwargs or {}, out_val=out)
        return out


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def resident(field_name: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the resident memory of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field_name}")


def _peak_in_this_process(case: Case, variant: Variant) -> int:
    torch.set_num_threads(case.threads)
    run = prepare(case, variant.method)(variant)
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    of_case, of_variant = request["case"], request["variant"]
    print(
        _peak_in_this_process(
            Case(**of_case | {"widths": tuple(of_case["widths"])}),
            Variant(**of_variant | {"engine": Engine(**of_variant["engine"])}),
        )
    )
