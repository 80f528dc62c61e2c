"""Speed and memory of an ingest, compared with a sequential loop and a torch DataLoader that do the same work.

All variants find, read and decode each image file, hash the pair and write it to Parquet shards. Each variant runs in a
separate process. Peak memory is the sum of the proportional set sizes of the process and its descendants.
"""

import csv
import hashlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.utils.data
from benchmarks import common
from PIL import Image

from rmdd import config
from rmdd.core.files import atomic_path
from rmdd.core.progress import Progress
from rmdd.core.seeding import generator
from rmdd.pipeline import open_pipeline

VARIANTS = ("loop", "loader", "rmdd", "in_turn")
ROWS_PER_SHARD = 8192
ROWS_PER_GROUP = 512
FILES_PER_FOLDER = 1000
TABLE = "captions.csv"


@dataclass(frozen=True)
class Case:
    """Size of the ingest: `pairs` JPEG files of `side` x `side` pixels, read by `workers` processes."""

    pairs: int = 20_000
    side: int = 32
    seed: int = 0
    workers: int = 2
    object_store_mb: int = 512


def bench_ingest(case: Case, folder: Path, variants: str | Sequence[str] = VARIANTS) -> common.Numbers:
    """Measure each variant of the ingest once on the same generated pairs in `folder`."""
    variants = common.check_names(variants, VARIANTS, "variant")
    root = generate(case, folder / f"pairs-{case.pairs}-{case.side}-{case.seed}")
    results: common.Numbers = {"case": asdict(case), "variants": {}}
    for variant in variants:
        target = folder / variant
        shutil.rmtree(target, ignore_errors=True)
        numbers = common.measured("ingest", case, {"variant": variant, "root": str(root), "out": str(target)})
        shutil.rmtree(target)
        seconds = numbers["seconds"]
        numbers["pairs_per_s"] = round(numbers["pairs"] / seconds, 1)
        numbers["start_seconds"] = round(numbers.pop("wall") - seconds, 2)
        results["variants"][variant] = numbers
    first = next(iter(results["variants"].values()))
    for numbers in results["variants"].values():
        numbers["ratio"] = round(numbers["pairs_per_s"] / first["pairs_per_s"], 3)
    return results


def table(results: common.Numbers) -> str:
    """Format the speed, seconds and memory of each variant as a text table."""
    case, variants = results["case"], results["variants"]
    lines = [f"{case['pairs']} pairs of {case['side']} x {case['side']}, {case['workers']} workers"]
    lines.append(
        f"{'':10}{'pairs/s':>10}{'of ' + next(iter(variants)):>12}{'seconds':>10}{'start-up':>10}{'peak MiB':>10}"
    )
    for name, n in variants.items():
        speed = f"{n['pairs_per_s']:>10.0f}{n['ratio']:>12.2f}{n['seconds']:>10.1f}"
        lines.append(f"{name:10}{speed}{n['start_seconds']:>10.1f}{n['peak_mib']:>10.0f}")
    return "\n".join(lines)


def generate(case: Case, root: Path) -> Path:
    """Generate images of blurred noise with one caption each, unless the folder `root` has them already."""
    if (root / TABLE).is_file():
        return root
    rows = []
    for start in range(0, case.pairs, FILES_PER_FOLDER):
        name = f"images/{start // FILES_PER_FOLDER:05d}"
        (root / name).mkdir(parents=True, exist_ok=True)
        draws = generator(case.seed, "bench ingest", start)
        count = min(FILES_PER_FOLDER, case.pairs - start)
        for i, small in enumerate(torch.randint(256, (count, 4, 4, 3), generator=draws, dtype=torch.uint8).numpy()):
            path = f"{name}/{start + i:07d}.jpg"
            Image.fromarray(small).resize((case.side, case.side)).save(root / path, "JPEG", quality=90)
            rows.append((path, f"picture {start + i} whose first spot is {small[0, 0].tolist()}"))
    with atomic_path(root / TABLE) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("image", "caption"), *rows])
    return root


def _run(case: Case, task: common.Numbers) -> common.Numbers:
    """Run one variant in the measured process; the seconds exclude the start of the process and its imports."""
    root, out = Path(task["root"]), Path(task["out"])
    if task["variant"] in ("rmdd", "in_turn"):
        return _rmdd(case, root, out, "on" if task["variant"] == "rmdd" else "off")
    began = time.perf_counter()
    with open(root / TABLE, encoding="utf-8", newline="") as f:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(f)]
    samples: Any = _Samples(root, rows)
    if task["variant"] == "loop":
        written = _write((samples[i] for i in range(len(samples))), out)
    else:
        loader: Any = torch.utils.data.DataLoader(
            samples, batch_size=ROWS_PER_GROUP, num_workers=case.workers, collate_fn=list
        )
        written = _write((sample for batch in loader for sample in batch), out)
    return {"pairs": written, "seconds": round(time.perf_counter() - began, 2)}


def _rmdd(case: Case, root: Path, out: Path, ray: Any) -> common.Numbers:
    runtime = config.Runtime(storage=str(out), ray=ray, num_cpus=case.workers, object_store_mb=case.object_store_mb)
    run = config.Run(data=config.Data(source="table", root=str(root)), runtime=runtime)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        began = time.perf_counter()
        dataset = pipeline.ingest()
        seconds = round(time.perf_counter() - began, 2)
        pairs = sum(count["pairs"] for count in dataset.counts.values())
        return {"pairs": pairs, "seconds": seconds, "data_hash": dataset.hash}


class _Samples:
    def __init__(self, root: Path, rows: list[tuple[str, str]]):
        self.root, self.rows = root, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[str, str, bytes, bytes]:
        name, caption = self.rows[i]
        data = (self.root / name).read_bytes()
        Image.open(io.BytesIO(data)).convert("RGB")
        return name, caption, data, hashlib.sha256(data + caption.encode()).digest()


def _write(samples: Iterator[tuple[str, str, bytes, bytes]], out: Path) -> int:
    """Write samples to shards in a sequential loop, without rmdd; return the number of pairs."""
    out.mkdir(parents=True)
    content, writer, count = hashlib.sha256(), None, 0
    rows: list[tuple[str, str, bytes]] = []
    schema = pa.schema([("pair_id", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.string()))])

    def flush() -> None:
        if rows and writer is not None:
            names, captions, images = zip(*rows, strict=True)
            columns = {"pair_id": list(names), "image": list(images), "captions": [[c] for c in captions]}
            writer.write_table(pa.table(columns, schema=schema))
            rows.clear()

    for name, caption, image, digest in samples:
        if count % ROWS_PER_SHARD == 0:
            flush()
            if writer is not None:
                writer.close()
            path = out / f"{count // ROWS_PER_SHARD:05d}.parquet"
            writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
        content.update(digest)
        rows.append((name, caption, image))
        count += 1
        if len(rows) == ROWS_PER_GROUP:
            flush()
    flush()
    if writer is not None:
        writer.close()
    for shard in sorted(out.glob("*.parquet")):
        with open(shard, "rb") as f:
            hashlib.file_digest(f, "sha256")
    return count


def _measure(case: Case, arguments: Any) -> common.Numbers:
    with tempfile.TemporaryDirectory() as temporary:
        return bench_ingest(case, Path(arguments.folder or temporary), arguments.variants)


if __name__ == "__main__":
    common.main(__doc__, Case, _measure, table, _run, variants=",".join(VARIANTS), folder="")
