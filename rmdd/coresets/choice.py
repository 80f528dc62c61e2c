"""The options of a coreset: selection method, size, features and filters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rmdd.config import ConfigError, Run
from rmdd.config.numbers import PositiveInt
from rmdd.config.runfile import Clash, Section

POOL = 1000
"""Number of caption records that each record is compared with to count forgetting, if `experts.forgetting` is unset."""
BY_FEATURES = ("herding", "k_center", "medoids", "matched", "clip_score")
AT_ONCE = ("medoids", "matched")
"""Selection methods that choose all pairs jointly, so a smaller coreset is not the beginning of a larger one."""

SelectionMethod = Literal["random", "herding", "k_center", "forgetting", "medoids", "matched", "clip_score"]
ChoiceUnit = Literal["image", "record"]
FeatureSpace = Literal["joint", "image", "text", "sum"]


class Choice(Section):
    """The options of a coreset. The size is given by either `pairs` or `bytes`."""

    method: SelectionMethod = Field("herding", description="selection method")
    pairs: Annotated[int, Field(ge=0)] | None = Field(None, description="number of image-text pairs to choose")
    bytes: PositiveInt | None = Field(
        None, description="choose as many pairs as fit into this many bytes (encoded images and captions)"
    )
    seed: int | None = Field(None, description="seed of the random choices; null: the seed of the run")
    unit: ChoiceUnit = Field("image", description="image: at most one caption per image; record: any number per image")
    caption: Literal["mean", "seeded"] = Field(
        "mean", description="text features of an image: mean over its captions, or those of one random caption"
    )
    encoder: str = Field(
        "tower",
        pattern=r"^(tower|expert(:\d+)?|columns:[^/\\]+|clip:.+)$",
        description="encoder of the features: tower: initial towers of the run, without projection; expert:N: expert N "
        "of the run; columns:NAME: dataset columns image.NAME and text.NAME; clip:NAME: CLIP by hub id or folder",
    )
    space: FeatureSpace = Field(
        "joint", description="features to compare: joint: image and text concatenated; sum: their sum; image; text"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="floating-point type of the feature files")
    draw: Literal["permutation", "hash"] = Field(
        "permutation", description="method random: first items of a permutation, or items with the smallest id hashes"
    )
    start: Literal["random", "mean"] = Field(
        "random", description="method k_center: the first pick is a random item, or the item nearest to the mean"
    )
    clusters: Annotated[int, Field(ge=0)] = Field(
        0, description="number of k-means clusters; the method chooses in each cluster; 0: no clusters"
    )
    quota: Literal["equal", "proportional", "sqrt"] = Field(
        "equal", description="pairs per cluster: equal, or proportional to the cluster's size or to its square root"
    )
    guard: Literal["none", "centroids", "cosine"] = Field(
        "none", description="before choosing, drop items far from 1,000 k-means centroids or with low image-text cosine"
    )
    guard_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of items that guard drops")
    expert: Annotated[int, Field(ge=0)] = Field(0, description="method forgetting: index of the expert to use, from 0")
    never_learned: Literal["first", "last", "exclude"] = Field(
        "last", description="method forgetting: where to put records that were never correct; papers put them first"
    )

    def clashes(self) -> list[Clash]:
        mistakes = []
        if (self.pairs is None) == (self.bytes is None):
            text = "give either pairs or bytes, found " + ("neither" if self.pairs is None else "both")
            mistakes.append(Clash(text, "pairs", "bytes"))
        if self.clusters and self.method in AT_ONCE:
            text = f"method {self.method} already makes clusters; remove the option clusters"
            mistakes.append(Clash(text, "method", "clusters"))
        if self.method == "matched" and self.space != "joint":
            text = f"method matched clusters images and texts separately, not in space {self.space}; set space: joint"
            mistakes.append(Clash(text, "method", "space"))
        cosines = [f"method {self.method}"] if self.method == "clip_score" else []
        cosines += ["guard cosine"] if self.guard == "cosine" else []
        if cosines and self.encoder == "tower":
            text = (
                f"{' and '.join(cosines)}: the cosine of image and text is needed, but untrained towers have no joint "
                "embedding space; set encoder to clip:NAME, columns:NAME (dataset columns) or expert:N"
            )
            mistakes.append(Clash(text, "method", "guard", "encoder"))
        return mistakes

    @property
    def needs_features(self) -> bool:
        return self.method in BY_FEATURES or self.clusters > 0 or self.guard != "none"

    def options(self) -> dict[str, Any]:
        """Return the options that affect which pairs are selected, except `method`, the size, `seed` and `unit`."""
        used = []
        if self.needs_features:
            used += ["encoder", "space", "dtype"] + (["caption"] if self.unit == "image" else [])
        used += {"random": ["draw"], "k_center": ["start"], "forgetting": ["expert", "never_learned"]}.get(
            self.method, []
        )
        used += ["clusters", "quota"] if self.clusters else []
        used += ["guard", "guard_share"] if self.guard != "none" else []
        return {name: getattr(self, name) for name in used}

    @property
    def experts(self) -> list[int]:
        """Indices of the experts that the selection uses to encode features or to count forgetting events."""
        kind, _, number = self.encoder.partition(":")
        encoders = [int(number or 0)] if self.needs_features and kind == "expert" else []
        return encoders + ([self.expert] if self.method == "forgetting" else [])

    def prepared(self, run: Run) -> Run:
        """Return `run`, or a copy that counts forgetting events if the method needs them and `run` does not count them.

        Raises `ConfigError` for an expert that the run does not train.
        """
        if self.method == "forgetting" and not run.experts.forgetting:
            counting = {"forgetting": POOL, "num": 1 + max(self.experts)}
            run = run.model_copy(update={"experts": run.experts.model_copy(update=counting)})
        if missing := [n for n in self.experts if n >= run.experts.num]:
            wrong = f"the coreset needs expert {max(missing)}, but the run trains {run.experts.num}; raise experts.num"
            raise ConfigError([wrong], "coreset")
        return run
