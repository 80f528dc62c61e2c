"""Read and write the tensors of synthetic sets: the set of one phase, or all subsets of a distilled set.

Tensor names begin with the number of the subset: `0.images`, `0.texts`, `0.lr_image`, `0.lr_text`. A full similarity is
`0.similarity.matrix`; a low-rank one is `0.similarity.scale`, `.left` and `.right`; the identity is not stored. The
metadata of the file hold `alpha`, one number per subset.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rmdd.core.tensors import Damaged, checksum, flatten_groups, load_checked, save_checked, split_groups
from rmdd.distill.synthetic import Synthetic, from_tensors

ENTRY = "set"


def write_subsets(path: Path, subsets: Sequence[Mapping[str, Tensor]], alpha: Sequence[float]) -> None:
    save_checked(path, _named(subsets), ENTRY, {"alpha": list(alpha)})


def name_by_content(subsets: Sequence[Mapping[str, Tensor]], alpha: Sequence[float]) -> str:
    """Return a file name that contains a hash of the tensors; equal tensors get the same name."""
    named = {name: t.detach().cpu().contiguous() for name, t in _named(subsets).items()}
    return checksum(named, {"alpha": list(alpha)})[:16] + ".safetensors"


def read_subsets(path: Path) -> list[tuple[dict[str, Tensor], float]]:
    """Return the tensors and the similarity weight alpha of each subset. Raises `Damaged` for an unreadable file."""
    tensors, facts = load_checked(path, ENTRY)
    groups, alpha = split_groups(tensors), facts["alpha"]
    if not isinstance(alpha, list) or groups.keys() != {str(k) for k in range(len(alpha))}:
        raise Damaged("its tensor names are unknown; another version of rmdd wrote the file")
    return [(groups[str(k)], float(a)) for k, a in enumerate(alpha)]


def save_set(synthetic: Synthetic, path: Path) -> None:
    write_subsets(path, [synthetic.tensors()], [synthetic.alpha])


def load_set(path: Path) -> Synthetic:
    """Read the synthetic set of one phase. Raises `ValueError` when the file is damaged."""
    try:
        ((tensors, alpha),) = read_subsets(path)
    except Damaged as error:
        raise ValueError(
            f"the set {path} is damaged ({error}); delete {path.parent} to distil that phase again"
        ) from error
    return from_tensors(tensors, alpha)


def _named(subsets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return flatten_groups({str(k): tensors for k, tensors in enumerate(subsets)})
