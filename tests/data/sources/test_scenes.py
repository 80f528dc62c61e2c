import io
import json

import numpy as np
from formats import rows_of
from PIL import Image

from rmdd.config import Captions, Data, Scenes
from rmdd.data.captions import clean
from rmdd.data.sources.scenes import SENTENCES, draw, plan

SMALL = Scenes(train=300, val=60, test=60, size=32)


def rows(scenes=SMALL):
    return rows_of(Data(scenes=scenes))


def picture(row):
    return np.asarray(Image.open(io.BytesIO(draw(row.drawing))))


def test_scenes_are_reproducible_and_depend_on_the_seed():
    assert rows() == rows()
    assert draw(rows()[0].drawing) == draw(rows()[0].drawing)
    other = rows(SMALL.model_copy(update={"seed": 1}))
    assert [row.captions for row in other] != [row.captions for row in rows()]


def test_a_larger_train_split_does_not_change_val_and_test():
    longer = rows(SMALL.model_copy(update={"train": 400}))
    assert longer[:300] == rows()[:300] and longer[400:] == rows()[300:]


def test_no_two_scenes_are_described_or_drawn_alike():
    scenes = [scene for part in plan(SMALL).values() for scene in part]
    assert len(set(scenes)) == 420
    rule = Captions()
    captions = [clean(caption, rule) for row in rows() for caption in row.captions]
    assert len(set(captions)) == len(captions) == 2100
    assert len({picture(row).tobytes() for row in rows()}) == 420


def test_each_scene_has_five_captions_within_the_published_word_limit():
    for row in rows():
        assert len(row.captions) == 5
        assert max(len(caption.split()) for caption in row.captions) <= 30
        for thing in json.loads(row.drawing)["scene"]["things"]:
            assert all(f"{thing['colour']} {thing['shape']}" in caption for caption in row.captions)
    assert all(len(set(sentences)) == 6 for sentences in SENTENCES.values())


def test_images_contain_the_colours_of_their_scene():
    from rmdd.data.sources.scenes import BACKGROUNDS, COLOURS

    for row in rows()[:60]:
        image, scene = picture(row).astype(int), json.loads(row.drawing)["scene"]
        assert image.shape == (32, 32, 3)
        plain = [COLOURS[thing["colour"]] for thing in scene["things"] if thing["texture"] == "plain"]
        for colour in [BACKGROUNDS[scene["background"]], *plain]:
            assert np.abs(image - colour).sum(axis=-1).min() < 60
