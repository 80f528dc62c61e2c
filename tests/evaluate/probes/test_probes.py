"""Tests of probe scores against slow implementations and chance levels of random towers, and of invalid settings."""

import json
import statistics

import formats
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probing import WIDTH, run_of, textcaps_probe, vqa_probe, zero_shot_probe

from rmdd import config
from rmdd.core.storage import run_folder
from rmdd.data.ingest import ingest
from rmdd.data.sources.cocoqa import Question
from rmdd.evaluate import retrieval
from rmdd.evaluate.probes import of_run as probes
from rmdd.evaluate.probes import ranking, vqa, zero_shot
from rmdd.models.dual import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Fixture: a small dataset of drawn images that serves as the distilled dataset."""
    return ingest(run_of("unused", {}).data, tmp_path_factory.mktemp("train") / "scenes")


@pytest.fixture
def ready(tmp_path, train):
    """Fixture: a function that prepares a probe named `p` and returns the run and the facts to report."""

    def make(probe, dataset=train, **data):
        run = run_of(tmp_path / "runs", {"p": probe}, **data)
        return run, probes.prepare(run, "p", dataset)

    return make


def tower(run, index=0):
    return build(run.model, WIDTH, run.data.image_size, 0, "random", index).eval()


def answers(run):
    return json.loads((run_folder(run) / "probes" / "p.json").read_text())["asked"]


def embedded(run, texts, tmp_path):
    return torch.tensor(probes.embed(texts, run.model.text, tmp_path / "own-cache"))


def pictures_of(run, folder, names):
    """Return the normalised images of the files `names`, decoded with PIL step by step."""
    from PIL import Image

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in probes.normalisation("clip"))
    stack = []
    for name in names:
        image = Image.open(folder / name).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
        stack.append((torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(stack)


# -- scores -----------------------------------------------------------------------------------------------------


def test_zero_shot_equals_a_slow_version(tmp_path, ready):
    classes = ["n01", "n02", "n03", "n04"]
    formats.class_folders(tmp_path / "in", classes)
    (tmp_path / "in" / "names.txt").write_text("n01 Marsh Heron!\nn02 crane, bird\nn03 kite\nn04 drake\n")
    probe = zero_shot_probe(tmp_path / "in", {"names": "names.txt", "synonyms": True}, templates="seven", ks=[1, 2, 4])
    run, facts = ready(probe)
    model = tower(run)
    names = [["marsh heron"], ["crane", "bird"], ["kite"], ["drake"]]  # class names become these after cleaning
    prototypes = []
    for each in names:
        lines = [t.replace("{}", name).replace(".", " ").strip() for name in each for t in zero_shot.TEMPLATES["seven"]]
        with torch.no_grad():
            prototypes.append(F.normalize(model.embed_texts(embedded(run, lines, tmp_path)).mean(0), dim=0))
    hits = {1: 0, 2: 0}
    for c, name in enumerate(classes):
        for file in sorted((tmp_path / "in" / "val" / name).iterdir()):
            with torch.no_grad():
                u = model.embed_images(pictures_of(run, file.parent, [file.name]))[0]
            scores = [float(u @ p) for p in prototypes]
            rank = sum(s >= scores[c] for i, s in enumerate(scores) if i != c)
            for k in hits:
                hits[k] += rank < k
    result = probes.probe(model, run, "p", CPU)
    assert result == {f"ACC@{k}": pytest.approx(100 * n / 12) for k, n in hits.items()}, (
        "ACC@4 must be left out, since 4 classes always give 100"
    )
    assert facts["chance"] == {"ACC@1": 25, "ACC@2": 50} and facts["pictures"] == 12 and facts["names"][1] == "crane"


def test_vqa_equals_a_slow_version(tmp_path, ready):
    words = [("what is it", "how many"), ("dog", "two", "red", "park", "cat")]
    rows = [(words[0][i % 2], words[1][i % 5], 100 + i % 4, i % 4) for i in range(14)]
    formats.cocoqa(tmp_path / "cocoqa", [("what is it", "horse", 1, 0)], rows)
    formats.coco_pictures(tmp_path, range(100, 104))
    run, facts = ready(vqa_probe(tmp_path, ks=[1, 3], question_mark=True))
    model = tower(run)
    candidates = sorted({*words[1], "horse"})
    assert facts["answers"] == 6 and facts["distinct_questions"] == 2 and facts["questions"] == 14
    folder = tmp_path / "val2014"
    with torch.no_grad():
        names = [f"COCO_val2014_{100 + i:012d}.jpg" for i in range(4)]
        u = model.embed_images(pictures_of(run, folder, names))
        hits = {"ACC": {1: 0, 3: 0}, "blind ACC": {1: 0, 3: 0}}
        for question, answer, image, _ in rows:
            lines = [f"Question: {question} ? Answer: {a}." for a in candidates]
            v = model.embed_texts(embedded(run, lines, tmp_path))
            for kind, query in (("ACC", u[image - 100]), ("blind ACC", F.normalize(u.mean(0), dim=0))):
                scores = v @ query
                rank = int((scores >= scores[candidates.index(answer)] - 1e-6).sum()) - 1
                for k in hits[kind]:
                    hits[kind][k] += rank < k
    wanted = {f"{kind}@{k}": pytest.approx(100 * n / 14) for kind, of in hits.items() for k, n in of.items()}
    assert probes.probe(model, run, "p", CPU) == wanted


def test_the_block_size_does_not_change_the_scores(tmp_path, ready, monkeypatch):
    rows = [(f"what {i % 5}", f"a{i % 7}", 100 + i % 3, 0) for i in range(35)]
    formats.cocoqa(tmp_path / "cocoqa", rows, rows)
    formats.coco_pictures(tmp_path, range(100, 103))
    run, _ = ready(vqa_probe(tmp_path))
    expected = probes.probe(tower(run), run, "p", CPU)
    for block, texts, pairs in ((15, 8, 2), (1, 7, 1)):
        monkeypatch.setattr(vqa, "BLOCK", block)
        monkeypatch.setattr(ranking, "TEXTS", texts)
        monkeypatch.setattr(vqa, "PAIRS", pairs)
        assert probes.probe(tower(run), run, "p", CPU) == expected


def test_majority_answers_come_from_train_per_question_type():
    def questions(*rows):
        return [Question("q", answer, "i", kind, 1) for answer, kind in rows]

    train = questions(("two", "number"), ("two", "number"), ("one", "number"), ("red", "colour"), ("blue", "colour"))
    test = questions(("two", "number"), ("one", "number"), ("red", "colour"), ("green", "colour"))
    result = vqa.majority(train, test, [1, 2])
    assert result["number"] == {"ACC@1": 50, "ACC@2": 100}
    assert result["colour"] == {"ACC@1": 0, "ACC@2": 50}, "blue and red are equally frequent, so blue ranks first"
    assert result["all"] == {"ACC@1": 25, "ACC@2": 75}
    unknown = vqa.majority(questions(("red", "colour")), questions(("green", "colour")), [5])
    assert unknown["all"] == {"ACC@5": 0}, "an answer that train does not contain must be a miss at every K"


def test_images_of_the_train_split_are_counted_and_scored_apart(tmp_path, ready):
    rows = [("what is it", f"a{i}", 100 + i % 4, 0) for i in range(12)]
    formats.cocoqa(tmp_path / "qa" / "cocoqa", rows, rows)
    formats.coco_pictures(tmp_path / "qa", range(100, 104))
    formats.picture(tmp_path / "train" / "train2017" / "000000000101.jpg")
    formats.picture(tmp_path / "train" / "train2017" / "000000000999.jpg")
    table = "image,caption,split\n" + "".join(f"train2017/{n:012d}.jpg,a dog,train\n" for n in (101, 999))
    (tmp_path / "train" / "captions.csv").write_text(table)
    dataset = ingest(config.Data(source="table", root=str(tmp_path / "train")), tmp_path / "seen")
    run, facts = ready(vqa_probe(tmp_path / "qa"), dataset)
    assert facts["overlap"] == {"pictures": 1, "questions": 3, "share": 0.25}
    assert "1 of its images are in the train split" in " ".join(probes.remarks("p", facts))
    result = probes.probe(tower(run), run, "p", CPU)
    assert {"ACC@1", "blind ACC@1", "unseen ACC@1"} <= result.keys()


# -- chance -----------------------------------------------------------------------------------------------------


def near(result, chance):
    """Return whether the mean score of random towers differs from `chance` by at most 4 standard errors."""
    error = statistics.stdev(result) / len(result) ** 0.5
    return abs(statistics.fmean(result) - chance) <= 4 * error + 1e-9


def test_random_towers_classify_by_chance(tmp_path, ready):
    formats.class_folders(tmp_path, [f"c{i}" for i in range(12)], each=4)
    run, facts = ready(zero_shot_probe(tmp_path))
    assert facts["chance"] == {"ACC@1": 100 / 12, "ACC@5": 500 / 12, "ACC@10": 1000 / 12}
    result = [probes.probe(tower(run, i), run, "p", CPU) for i in range(24)]
    for metric, chance in facts["chance"].items():
        assert near([f[metric] for f in result], chance), metric


def test_random_towers_answer_by_chance(tmp_path, ready):
    rows = [(f"what is it {q}", f"answer{a}", 100 + (a * 7 + q) % 10, 0) for q in range(3) for a in range(43)]
    formats.cocoqa(tmp_path / "cocoqa", rows, rows)
    formats.coco_pictures(tmp_path, range(100, 110))
    run, facts = ready(vqa_probe(tmp_path))
    assert facts["chance"] == {f"ACC@{k}": 100 * k / 43 for k in (1, 5, 10)}
    result = [probes.probe(tower(run, i), run, "p", CPU) for i in range(24)]
    for metric, chance in facts["chance"].items():
        assert near([f[metric] for f in result], chance), metric
        assert near([f[f"blind {metric}"] for f in result], chance), metric


def test_random_towers_retrieve_by_chance(tmp_path, ready):
    letters = np.random.default_rng(0)

    def random_caption(image, n):  # random letters, because similar captions would get similar ranks
        return bytes(letters.integers(97, 123, 30, dtype=np.uint8)).decode()

    formats.textcaps(tmp_path, "val", [f"{i:016x}" for i in range(30)], say=random_caption)
    run, facts = ready(textcaps_probe(tmp_path))
    result = [probes.probe(tower(run, i), run, "p", CPU) for i in range(24)]
    assert facts["gallery"]["captions"] == 60
    for metric, chance in facts["chance"].items():
        assert near([f[metric] for f in result], chance), metric


@pytest.mark.parametrize(
    ("captions", "ir", "tr"),
    [
        ([5] * 1000, (0.10, 0.50, 1.00), (0.100, 0.499, 0.996)),
        ([5] * 1014, (0.099, 0.493, 0.986), (0.099, 0.492, 0.983)),
        ([5] * 4990 + [6] * 10, (0.02, 0.10, 0.20), (0.020, 0.100, 0.200)),
        ([1] * 10_000, (0.01, 0.05, 0.10), (0.01, 0.05, 0.10)),
    ],
)
def test_chance_levels_of_retrieval(captions, ir, tr):
    result = retrieval.chance(torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))).as_dict()
    for k, i, t in zip((1, 5, 10), ir, tr, strict=True):
        assert result[f"IR@{k}"] == pytest.approx(i, abs=6e-4) and result[f"TR@{k}"] == pytest.approx(t, abs=6e-4)


def test_collapsed_and_broken_towers_score_0(tmp_path, ready):
    formats.class_folders(tmp_path / "in", ["a", "b", "c"])
    rows = [("what", f"a{i}", 100, 0) for i in range(12)]
    formats.cocoqa(tmp_path / "qa" / "cocoqa", rows, rows)
    formats.coco_pictures(tmp_path / "qa", [100])
    for probe in (zero_shot_probe(tmp_path / "in"), vqa_probe(tmp_path / "qa")):
        run, _ = ready(probe)
        for weight, bias in ((0.0, 1.0), (float("nan"), 0.0), (0.0, 0.0)):
            model = tower(run)
            with torch.no_grad():
                model.text_head.weight.fill_(weight)
                model.text_head.bias.fill_(bias)
            result = probes.probe(model, run, "p", CPU)
            assert result and set(result.values()) == {0.0}


def test_classes_with_the_same_name_count_as_misses(tmp_path, ready):
    formats.class_folders(tmp_path, ["n01", "n02"])
    (tmp_path / "names.txt").write_text("n01 crane\nn02 crane\n")
    run, facts = ready(zero_shot_probe(tmp_path, {"names": "names.txt"}))
    assert facts["duplicate_names"] == 2 and any("share a name" in line for line in probes.remarks("p", facts))
    assert probes.probe(tower(run), run, "p", CPU) == {"ACC@1": 0.0}


# -- invalid input ----------------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_counted(tmp_path, ready):
    rows = [("what", f"a{i}", 100 + i, 0) for i in range(4)]
    formats.cocoqa(tmp_path / "cocoqa", rows, rows)
    formats.coco_pictures(tmp_path, (100, 101))
    (tmp_path / "val2014" / "COCO_val2014_000000000102.jpg").write_bytes(b"broken")
    run, facts = ready(vqa_probe(tmp_path))
    assert facts["quarantine"] == {"missing_file": 1, "undecodable": 1} and facts["without_picture"] == 2
    assert "left out 1 missing_file, 1 undecodable" in " ".join(probes.remarks("p", facts))
    assert len(answers(run)["pairs"]) == 2


def test_templates_are_given_by_name_by_file_or_as_a_list(tmp_path):
    assert tuple(zero_shot.TEMPLATES) == config.probes.TEMPLATES
    assert all("{}" in line for lines in zero_shot.TEMPLATES.values() for line in lines)
    (tmp_path / "mine.txt").write_text("a {}\n\nthe {}.\n")
    assert zero_shot.templates(str(tmp_path / "mine.txt")) == ("a {}", "the {}.")
    assert zero_shot.templates(("one {}",)) == ("one {}",)
    (tmp_path / "mine.txt").write_text("a {}\nthe dog\n")
    with pytest.raises(ValueError, match=r"mine.txt: line 2 is not a template, found 'the dog'; write \{\}"):
        zero_shot.templates(str(tmp_path / "mine.txt"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "shot"}, "evaluate.probes.p: Input tag 'shot'"),
        ({"data": {}}, "evaluate.probes.p: source 'classes' reads files; set evaluate.probes.p.data.root"),
        ({"colour": 1}, "evaluate.probes.p.colour: unknown key"),
        ({"data": {"root": "r", "image_size": 8}}, "evaluate.probes.p.data.image_size is 8, but a probe uses"),
        ({"data": {"root": "r", "eval_limit": 8}}, "set evaluate.probes.p.data.classes.number"),
        ({"ks": []}, "evaluate.probes.p.ks: "),
        ({"data": {"root": "r", "classes": {"number": 1}}}, "evaluate.probes.p.data.classes.number: "),
    ],
)
def test_an_invalid_option_is_named_in_the_message(tmp_path, change, words):
    with pytest.raises(config.ConfigError) as error:
        run_of(tmp_path, {"p": {"kind": "zero_shot", "data": {"root": "r"}} | change})
    assert words in str(error.value)


def test_an_invalid_probe_name_is_rejected(tmp_path):
    with pytest.raises(config.ConfigError, match="'a/b' is not a valid name"):
        run_of(tmp_path, {"a/b": zero_shot_probe("r")})
