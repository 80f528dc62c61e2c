"""RepBlend: representation blending and symmetric projection matching (arXiv 2505.14705).

Distilled images drift together, and so do texts, while the two modalities drift apart. Two changes to LoRS:

    blending    each inner step mixes what the encoders give, a' = lam a + (1 - lam) a[q] for images and b' likewise for
                texts, with one lam ~ Beta(1, 1) and one permutation q of the batch for both, before the projections;
                targets are not mixed, and the students that use the set do not blend
    projection  both encoders are frozen, and a projection on each is trained and matched; pixels get their gradient
                through the frozen tower

lam and q are drawn per step and the same in both passes. The paper prints one ratio over both projections
(`branches: merged`, as its COCO scripts); its Flickr30k scripts take one per projection. The mix is
`rmdd.distill.trajectory.inner.blend`, its draw `rmdd.distill.phases.Blend`.
"""

from rmdd import config
from rmdd.config.runfile import filled
from rmdd.methods.lors import LoRS


class RepBlend(LoRS):
    reference = "repblend"
    card = "2505.14705"
    verified = "blended steps equal slow float64 ones; above random pairs on emoji. Open: published figures"
    defaults = filled(
        {"model": {"image": {"trainable": False, "projection": "block"}}, "distill": {"blend": 1.0}}, LoRS.defaults
    )

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        found = []
        if run.model.image.trainable:
            found.append(
                "distill.method repblend matches projections on frozen towers; set model.image.trainable: false, or "
                "take method: lors with distill.blend for blending alone"
            )
        if run.distill.blend == 0:
            found.append("distill.method repblend blends; set distill.blend above 0, or take method: lors")
        return found
