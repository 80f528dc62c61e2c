"""What is asked of a coreset."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rmdd.config import ConfigError, Run
from rmdd.config.numbers import PositiveInt
from rmdd.config.runfile import Clash, Section

POOL = 1000
"""Records that forgetting is counted against where `experts.forgetting` does not say."""
BY_FEATURES = ("herding", "k_center", "medoids", "matched", "clip_score")
AT_ONCE = ("medoids", "matched")
"""Methods whose fewer picks are not the first of more."""

SelectionMethod = Literal["random", "herding", "k_center", "forgetting", "medoids", "matched", "clip_score"]
ChoiceUnit = Literal["image", "record"]
FeatureSpace = Literal["joint", "image", "text", "sum"]


class Choice(Section):
    """A method, how much it may choose, and what it looks at. Give `pairs` or `bytes`."""

    method: SelectionMethod = Field("herding", description="how pairs are chosen")
    pairs: Annotated[int, Field(ge=0)] | None = Field(None, description="pairs to choose")
    bytes: PositiveInt | None = Field(None, description="as many as fit, as encoded images and captions")
    seed: int | None = Field(None, description="null: the run's seed")
    unit: ChoiceUnit = Field("image", description="image: at most one caption of an image; record: any caption records")
    caption: Literal["mean", "seeded"] = Field(
        "mean", description="text of an image: the mean over its captions, or the one that is drawn to go with it"
    )
    encoder: str = Field(
        "tower",
        pattern=r"^(tower|expert(:\d+)?|columns:[^/\\]+|clip:.+)$",
        description="tower: the run's towers untrained by pairs, no projection; expert:N: expert N of the store; "
        "columns:NAME: the columns image.NAME and text.NAME of the dataset; clip:NAME: a CLIP by hub id or folder",
    )
    space: FeatureSpace = Field("joint", description="joint: both sides end to end; sum: their sum, for one width")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the features on disk")
    draw: Literal["permutation", "hash"] = Field("permutation", description="random: of all items, or smallest hashes")
    start: Literal["random", "mean"] = Field("random", description="k_center: first item, drawn or nearest the mean")
    clusters: Annotated[int, Field(ge=0)] = Field(0, description="choose within so many k-means clusters; 0: in all")
    quota: Literal["equal", "proportional", "sqrt"] = Field("equal", description="share of a cluster, by its size")
    guard: Literal["none", "centroids", "cosine"] = Field(
        "none", description="first drop items far from 1,000 k-means centroids, or with a low image-text cosine"
    )
    guard_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share that a guard drops")
    expert: Annotated[int, Field(ge=0)] = Field(0, description="forgetting: of which expert of the store")
    never_learned: Literal["first", "last", "exclude"] = Field(
        "last", description="forgetting: where records go that were never found; first is the published rule"
    )

    def clashes(self) -> list[Clash]:
        mistakes = []
        if (self.pairs is None) == (self.bytes is None):
            text = "give either pairs or bytes, found " + ("neither" if self.pairs is None else "both")
            mistakes.append(Clash(text, "pairs", "bytes"))
        if self.clusters and self.method in AT_ONCE:
            text = f"{self.method} makes clusters of its own; leave clusters out"
            mistakes.append(Clash(text, "method", "clusters"))
        if self.method == "matched" and self.space != "joint":
            text = f"method matched clusters both sides apart, which space {self.space} does not hold; use joint"
            mistakes.append(Clash(text, "method", "space"))
        cosines = [f"method {self.method}"] if self.method == "clip_score" else []
        cosines += ["guard cosine"] if self.guard == "cosine" else []
        if cosines and self.encoder == "tower":
            text = (
                f"{' and '.join(cosines)} compare an image with its text, which the untrained towers do not bring "
                "together; set encoder to clip:NAME, columns:NAME (features of the dataset) or expert:N"
            )
            mistakes.append(Clash(text, "method", "guard", "encoder"))
        return mistakes

    @property
    def needs_features(self) -> bool:
        return self.method in BY_FEATURES or self.clusters > 0 or self.guard != "none"

    def options(self) -> dict[str, Any]:
        """The fields that have an effect beside method, size, seed and unit."""
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
        """The experts that are looked at."""
        kind, _, number = self.encoder.partition(":")
        encoders = [int(number or 0)] if self.needs_features and kind == "expert" else []
        return encoders + ([self.expert] if self.method == "forgetting" else [])

    def prepared(self, run: Run) -> Run:
        """The run with an expert that is watched for what it forgets, where that is asked for and it has none.

        Raises `ConfigError` for an expert that the run does not train.
        """
        if self.method == "forgetting" and not run.experts.forgetting:
            watched = {"forgetting": POOL, "num": 1 + max(self.experts)}
            run = run.model_copy(update={"experts": run.experts.model_copy(update=watched)})
        if missing := [n for n in self.experts if n >= run.experts.num]:
            wrong = f"expert {max(missing)} is asked for, and the run has {run.experts.num}; raise experts.num"
            raise ConfigError([wrong], "coreset")
        return run
