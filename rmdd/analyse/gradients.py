"""Compare the matching gradients of different start epochs (PTM-ST, figures 4, 2b and 6a).

The distilled set is the initial set of the first phase. The gradients at all start epochs use the same batches and
dropout masks. The command `gradients` averages over experts and draws. The paper does not describe its batches or
averages.
"""

from typing import Any

from rmdd.analyse.setting import Setting, trajectories_of
from rmdd.distill.trajectory.statistics import PARTS, Probe, off_diagonal, principal
from rmdd.pipeline import Pipeline
from rmdd.report.sheets import Sheet, write_csv


def gradients(
    pipeline: Pipeline,
    *,
    endpoint: int | None = None,
    experts: int | None = None,
    draws: int = 2,
    shortcut_only: bool = False,
) -> dict[str, Any]:
    """Compute the norms of the matching gradients at all start epochs and the cosines between them, by modality.

    Write gradients.csv, gradient_norms.csv and gradients.svg to the run's folder `analyse`; return a summary.
    """
    setting = Setting(pipeline, trajectories_of(shortcut_only), endpoint=endpoint, experts=experts)
    probes = {name: setting.probe(name, draws, averaged=True) for name in setting.trajectories}
    cosines, sizes, summary = [], [], []
    sheet = Sheet(2 * len(probes) + 1)
    for row, (name, probe) in enumerate(probes.items()):
        for column, part in enumerate(PARTS):
            matrix = probe.cosine(part)
            summary.append({"trajectory": name, "of": part, **off_diagonal(matrix)})
            sheet.matrix(2 * row + column, f"{name}: {part}", matrix.numpy(), probe.starts, "start epoch")
            cosines += [
                {"trajectory": name, "of": part, "start": a, "other": b, "cosine": float(matrix[i, j])}
                for i, a in enumerate(probe.starts)
                for j, b in enumerate(probe.starts)
            ]
        sizes += _sizes(name, probe)
    lines = {name: probe.norms("images").tolist() for name, probe in probes.items()}
    title, ylabel = "gradient norm", "norm of the gradient of the images"
    ax = sheet.lines(2 * len(probes), title, setting.starts(), lines, "start epoch", ylabel)
    ax.set_yscale("log")
    files = {name: setting.folder / name for name in ("gradients.csv", "gradient_norms.csv", "gradients.svg")}
    write_csv(files["gradients.csv"], cosines)
    write_csv(files["gradient_norms.csv"], sizes)
    sheet.save(files["gradients.svg"])
    return {"rows": summary, "files": [str(f) for f in files.values()]}


def _sizes(name: str, probe: Probe) -> list[dict[str, Any]]:
    norms = {part: probe.norms(part).tolist() for part in PARTS}
    miss = probe.miss.mean(dim=1).tolist()
    return [
        {"trajectory": name, "start": start, "images": norms["images"][i], "texts": norms["texts"][i], "miss": miss[i]}
        for i, start in enumerate(probe.starts)
    ]


def pca(
    pipeline: Pipeline,
    *,
    endpoint: int | None = None,
    experts: int | None = None,
    draws: int = 4,
    shortcut_only: bool = False,
) -> dict[str, Any]:
    """Project the matching gradients of the images to two principal components.

    There is one gradient, and so one point, for each combination of start epoch, expert and draw.

    The components are computed separately for each kind of trajectory. Write pca.csv and pca.svg to the run's folder
    `analyse`; return a summary.
    """
    setting = Setting(
        pipeline, trajectories_of(shortcut_only), endpoint=endpoint, experts=experts, least=3, draws=draws
    )
    labels, points, summary = setting.labels(draws), [], []
    sheet = Sheet(len(setting.trajectories), width=4.4)
    for panel, name in enumerate(setting.trajectories):
        probe = setting.probe(name, draws)
        projected, shares = principal(probe.images.flatten(0, 1))
        coordinates = projected.unflatten(0, probe.images.shape[:2])
        summary.append({"trajectory": name, "first": float(shares[0]), "second": float(shares[1])})
        lengths = probe.images.norm(dim=2)
        points += [
            {
                "trajectory": name,
                "start": start,
                "expert": expert,
                "draw": draw,
                "first": float(coordinates[i, j, 0]),
                "second": float(coordinates[i, j, 1]),
                "length": float(lengths[i, j]),
            }
            for i, start in enumerate(probe.starts)
            for j, (expert, draw) in enumerate(labels)
        ]
        groups = {f"{s:g}": (coordinates[i, :, 0].tolist(), coordinates[i, :, 1].tolist()) for i, s in _thinned(probe)}
        axes = (f"first component ({shares[0]:.0%})", f"second component ({shares[1]:.0%})")
        sheet.points(panel, f"{name}: gradients", groups, *axes, legend="start epoch")
    files = [setting.folder / "pca.csv", setting.folder / "pca.svg"]
    write_csv(files[0], points)
    sheet.save(files[1])
    return {"rows": summary, "files": [str(f) for f in files]}


def _thinned(probe: Probe, most: int = 10) -> list[tuple[int, int | float]]:
    """Return at most `most` evenly spaced start epochs, so that a legend stays short, and their indices in `probe`."""
    step = -(-len(probe.starts) // most)
    return list(enumerate(probe.starts))[::step]
