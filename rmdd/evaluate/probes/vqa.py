"""COCO-QA as retrieval: the question and each candidate answer form a sentence, ranked by its cosine with the image.

Candidates are all distinct answers of COCO-QA. A student may guess an answer from the question alone, so two baselines
are reported. `blind` scores the same student with all images replaced by their mean embedding. `majority` answers with
the most frequent train answers to questions of the same type. Letters in shapes: Q distinct questions, A answers, N
(question, image) pairs, I images, D joint width.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from rmdd import config
from rmdd.data.captions import clean
from rmdd.data.sources import cocoqa
from rmdd.data.splits import Split
from rmdd.evaluate.probes import ranking
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import Constants

BLOCK = 2**18
"""Number of sentences embedded at once and cached in one file."""

PAIRS = 32
"""Number of (question, image) pairs scored at once."""


def task_of(
    probe: config.Vqa,
    data: config.CocoQaData,
    captions: config.Captions,
    split: Split,
    trained_on: frozenset[str] | None,
) -> dict[str, Any]:
    """Return the content of the probe: distinct questions, candidate answers, and triples (question, image, answer).

    `captions` holds the run's settings for caption cleaning; `trained_on` names the images of the distilled dataset, if
    known. The indices of probe images that are in the distilled dataset are listed under `seen`.
    """
    train, test = cocoqa.read(data, "train"), cocoqa.sampled_questions(data)
    image_of = {pair_id: i for i, pair_id in enumerate(split.pair_ids)}
    usable = [q for q in test if q.image in image_of]
    answers = sorted({q.answer for q in (*train, *cocoqa.read(data, "test"))})
    questions = sorted({q.question for q in usable})
    ks = [k for k in probe.ks if k < len(answers)]
    answer_of, question_of = ({word: i for i, word in enumerate(words)} for words in (answers, questions))
    return {
        "questions": questions,
        "answers": answers,
        "template": probe.template,
        "question_mark": probe.question_mark,
        "caption_rule": captions.model_dump() if probe.caption_rule else None,
        "pairs": sorted([question_of[q.question], image_of[q.image], answer_of[q.answer]] for q in usable),
        "seen": None if trained_on is None else [i for i, p in enumerate(split.pair_ids) if picture(p) in trained_on],
        "ks": ks,
        "majority": majority(train, usable, ks),
        "types": dict(Counter(q.type for q in usable)),
        "without_picture": len(test) - len(usable),
    }


def picture(pair_id: str) -> str:
    """Return the same name for the 2014 id and the 2017 id of a COCO image; return ids of other images unchanged."""
    name = pair_id.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    number = name.rsplit("_", 1)[-1] if name.startswith("COCO_") else name
    return f"coco {number}" if len(number) == 12 and number.isdecimal() else pair_id


def majority(train: Sequence[Any], test: Sequence[Any], ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Rank answers by their train frequency for the question type; return ACC@K, overall and per question type."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for q in train:
        counts[q.type][q.answer] += 1
    order = {t: {a: i for i, (a, _) in enumerate(sorted(c.items(), key=_frequent))} for t, c in counts.items()}
    miss = max(ks, default=0)
    ranks: dict[str, list[int]] = defaultdict(list)
    for q in test:
        rank = order.get(q.type, {}).get(q.answer, miss)
        ranks["all"].append(rank)
        ranks[q.type].append(rank)
    return {name: ranking.accuracies(torch.tensor(rank), ks) for name, rank in ranks.items()}


def _frequent(counted: tuple[str, int]) -> tuple[int, str]:
    """Return the sort key of an (answer, count) pair: higher counts first, equal counts in alphabetical order."""
    return -counted[1], counted[0]


def facts(task: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, counts, chance level and `majority` baseline that are reported with the VQA scores."""
    pairs = task["pairs"]
    copied = ("template", "question_mark", "caption_rule", "majority", "types", "without_picture")
    overlap = {}
    if task["seen"] is not None:
        train_images = set(task["seen"])
        shared = sum(image in train_images for _, image, _ in pairs)
        overlap = {"overlap": {"pictures": len(train_images), "questions": shared, "share": shared / len(pairs)}}
    return {
        **{name: task[name] for name in copied},
        "questions": len(pairs),
        "distinct_questions": len(task["questions"]),
        "answers": len(task["answers"]),
        **overlap,
        "chance": {f"ACC@{k}": 100 * k / len(task["answers"]) for k in task["ks"]},
    }


def sentences(task: dict[str, Any]) -> Iterator[list[str]]:
    """Yield blocks of sentences to embed; a block holds some questions, each combined with all candidate answers."""
    for start, stop in _blocks(task):
        yield [_sentence(task, q, a) for q in task["questions"][start:stop] for a in task["answers"]]


def _blocks(task: dict[str, Any]) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // len(task["answers"]))
    total = len(task["questions"])
    return ((start, min(start + step, total)) for start in range(0, total, step))


def _sentence(task: dict[str, Any], question: str, answer: str) -> str:
    question = f"{question} ?" if task["question_mark"] else question
    text = task["template"].replace("{question}", question).replace("{answer}", answer)
    rule = task["caption_rule"]
    return text if rule is None else clean(text, config.Captions(**rule))


def metrics(task: dict[str, Any]) -> list[str]:
    names = ["ACC", "blind ACC"]
    train_images = {image for _, image, _ in task["pairs"]} & set(task["seen"] or ())
    if train_images and any(image not in train_images for _, image, _ in task["pairs"]):
        names.append("unseen ACC")
    return [f"{name}@{k}" for name in names for k in task["ks"]]


@torch.no_grad()
def score(
    model: DualEncoder,
    task: dict[str, Any],
    split: Split,
    constants: tuple[Constants, Constants],
    embed: Callable[[list[str]], Any],
    device: torch.device,
    chunk: int,
    alive: Callable[[], object],
) -> dict[str, float]:
    """Return ACC@K in percent with images, without images (`blind`), and on images outside the distilled dataset.

    The last score is left out if all or none of the images are in that dataset. `model` must be in eval mode. Raise
    `Diverged` if the embeddings of the model collapsed.
    """
    images_ID = ranking.embed_pictures(model, split.images, constants, device, chunk, alive)
    mean_D = F.normalize(images_ID.mean(0), dim=0)
    pairs = torch.tensor(task["pairs"], device=device)
    answers, questions_at_once = len(task["answers"]), max(1, ranking.TEXTS // len(task["answers"]))
    with_image, blind = [], []
    for (first, last), block in zip(_blocks(task), sentences(task), strict=True):
        vectors = embed(block)
        for start in range(first, last, questions_at_once):
            stop = min(start + questions_at_once, last)
            rows = vectors[(start - first) * answers : (stop - first) * answers]
            texts_QAD = ranking.embed_texts(model, rows, device).unflatten(0, (stop - start, answers))
            in_block = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < stop)]
            for part in in_block.split(PAIRS):
                texts_NAD, images_ND = texts_QAD[part[:, 0] - start], images_ID[part[:, 1]]
                with_image.append(ranking.ranks(torch.einsum("nad,nd->na", texts_NAD, images_ND), part[:, 2]))
                blind.append(ranking.ranks((texts_QAD @ mean_D)[part[:, 0] - start], part[:, 2]))
            alive()
    rank, ks = torch.cat(with_image), task["ks"]
    scores = ranking.accuracies(rank, ks) | ranking.accuracies(torch.cat(blind), ks, "blind ACC")
    unseen = ~torch.isin(pairs[:, 1], torch.tensor(task["seen"] or [], dtype=pairs.dtype, device=device))
    if unseen.any() and not unseen.all():
        scores |= ranking.accuracies(rank[unseen], ks, "unseen ACC")
    return scores
