import formats
import pytest

from rmdd.config import CocoQa, CocoQaData
from rmdd.data.ingest import ingest
from rmdd.data.sources import cocoqa

TRAIN = [("what is the colour of the kettle", "green", 999001, 2), ("where is the dog", "park", 9, 3)]
TEST = [("how many boats are on the lake", "two", 999002, 1), ("what is on the lake", "boats", 999002, 0)]


@pytest.fixture
def released(root):
    formats.cocoqa(root / "cocoqa", TRAIN, TEST)
    return root


def data_of(root, **rule):
    return CocoQaData(root=str(root), cocoqa=CocoQa(**rule))


def test_four_aligned_files_are_read(released):
    (first, _) = cocoqa.read(data_of(released), "train")
    assert (first.question, first.answer, first.type) == ("what is the colour of the kettle", "green", "colour")
    assert first.image == "train2014/COCO_train2014_000000999001.jpg"
    assert [q.image for q in cocoqa.read(data_of(released), "test")] == ["val2014/COCO_val2014_000000999002.jpg"] * 2


def test_blank_lines_at_the_end_are_ignored(released):
    path = released / "cocoqa" / "test" / "answers.txt"
    path.write_text(path.read_text().replace("\n", "\r\n") + "\n \n")
    assert [q.answer for q in cocoqa.read(data_of(released), "test")] == ["two", "boats"]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "questions.txt",
            "how many\n\nwhat\n",
            "must have equal numbers of lines, found questions.txt 3, answers.txt 2",
        ),
        ("questions.txt", "\nwhat is on the lake\n", "test/questions.txt: line 1 is empty"),
        ("img_ids.txt", "999002\nboat\n", "test/img_ids.txt: line 2 is 'boat', expected the number"),
        ("types.txt", "1\n4\n", "test/types.txt: line 2 is '4', expected a type from 0 to 3"),
        ("types.txt", None, "types.txt not found"),
    ],
)
def test_unreadable_files_are_reported_with_file_and_line(released, file, text, words):
    path = released / "cocoqa" / "test" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=words):
        cocoqa.read(data_of(released), "test")


def test_sampled_questions_are_drawn_by_their_seed(root):
    formats.cocoqa(root / "elsewhere", TRAIN, [(f"what {i}", "dog", i, 0) for i in range(40)])
    drawn = [
        [q.line for q in cocoqa.sampled_questions(data_of(root, folder="elsewhere", questions=8, seed=s))]
        for s in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] == sorted(drawn[0]) and drawn[0] != drawn[1] and len(drawn[0]) == 8
    assert len(cocoqa.sampled_questions(data_of(root, folder=str(root / "elsewhere"), questions=99))) == 40


@pytest.mark.parametrize("place", ("val2014/COCO_val2014_000000999002.jpg", "train2017/000000999002.jpg"))
def test_images_are_found_under_their_2014_and_2017_names(released, tmp_path, place):
    formats.picture(released / place)
    dataset = ingest(data_of(released), tmp_path / "out")
    assert [pair.captions for pair in dataset.pairs("test")] == [
        ("Question: how many boats are on the lake Answer: two.", "Question: what is on the lake Answer: boats.")
    ]
