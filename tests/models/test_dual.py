import pytest
import torch
from toy import MODEL, SIZE, TEXT_WIDTH, encoder

from rmdd import config


def model_of(**image):
    return encoder(config.Model(**{**MODEL, "image": MODEL["image"] | image})).double()


def pairs(count=4):
    random = torch.Generator().manual_seed(0)
    shapes = (count, 3, SIZE, SIZE), (count, TEXT_WIDTH)
    return [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


def test_on_features_equals_the_model_after_its_tower():
    model, (images, texts) = model_of(projection="block").eval(), pairs()
    student = model.on_features()
    heads = {n: p for n, p in model.named_parameters() if not n.startswith("image_tower.")}
    shared = dict(student.named_parameters())
    assert shared.keys() == heads.keys() and all(shared[n] is p for n, p in heads.items())
    assert not student.training and student.temperature == model.temperature
    torch.testing.assert_close(student(model.image_tower(images), texts), model(images, texts), rtol=0, atol=0)
    student.train()
    assert student.image_head.training and student.on_features().training


def test_a_frozen_tower_stays_in_eval_mode():
    model = model_of(weights="random:0", trainable=False, projection="block").train()
    assert not model.image_tower.training and model.image_head.training
    assert {n.split(".")[0] for n in model.trained()} == {"image_head", "text_head"}
    assert model_of().train().image_tower.training


def test_mixing_gets_the_outputs_of_both_encoders():
    model, (images, texts) = model_of(projection="block").eval(), pairs()
    mixed = []

    def mixing(x):
        mixed.append(x)
        return x.flip(0)

    scores = model(images, texts, mixing)
    assert torch.equal(mixed[0], model.image_tower(images)) and torch.equal(mixed[1], texts)
    torch.testing.assert_close(scores, model(images.flip(0), texts.flip(0)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["random:", "random:-1", "random:one"])
def test_the_seed_of_random_weights_must_be_a_whole_number(name):
    with pytest.raises(ValueError, match="the seed must be a whole number, such as random:0"):
        config.ImageTower(weights=name)
