"""The built-in synthetic dataset: images of one to three shapes with five captions each, generated from a seed.

Each caption describes the scene completely: the background, the arrangement, and the colour, shape, size and texture of
each shape. No two scenes of a dataset are equal, so each caption has exactly one correct image.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from PIL import Image, ImageDraw

from rmdd.config import Data, Scenes
from rmdd.core.seeding import generator
from rmdd.data.source import AnnotationRow, AnnotationSource

T = TypeVar("T")

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 215, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 220),
    "purple": (135, 60, 180),
    "pink": (245, 130, 190),
    "brown": (125, 75, 45),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (18, 18, 18), "grey": (150, 150, 150), "pale blue": (185, 220, 240)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACES = {
    "in the top left corner": (0.28, 0.28),
    "at the top": (0.5, 0.28),
    "in the top right corner": (0.72, 0.28),
    "on the left": (0.28, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.72, 0.5),
    "in the bottom left corner": (0.28, 0.72),
    "at the bottom": (0.5, 0.72),
    "in the bottom right corner": (0.72, 0.72),
}
ARRANGEMENTS = {
    "left_right": ((0.27, 0.5), (0.73, 0.5)),
    "above_below": ((0.5, 0.27), (0.5, 0.73)),
    "row": ((0.19, 0.5), (0.5, 0.5), (0.81, 0.5)),
    "column": ((0.5, 0.19), (0.5, 0.5), (0.5, 0.81)),
    "pyramid": ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)),
}
RADIUS = {"single": 0.25, "left_right": 0.2, "above_below": 0.2, "row": 0.15, "column": 0.15, "pyramid": 0.18}

# A, B and C stand for the phrases of the shapes, in the order of ARRANGEMENTS; Z stands for the background.
SENTENCES = {
    "single": (
        "{A} {place} of a picture with {Z}",
        "there is {A} {place}, on {Z}",
        "on {Z}, {A} is seen {place}",
        "{Z} and {place} {A}",
        "a drawing of {A}, placed {place}, before {Z}",
        "nothing but {A} {place} against {Z}",
    ),
    "left_right": (
        "{A} to the left of {B} on {Z}",
        "{B} to the right of {A} on {Z}",
        "on {Z}, {A} stands left of {B}",
        "two shapes before {Z}: left {A}, right {B}",
        "a picture with {A} on the left side and {B} on the right side, on {Z}",
        "{Z} with {B} at the right hand of {A}",
    ),
    "above_below": (
        "{A} above {B} on {Z}",
        "{B} below {A} on {Z}",
        "on {Z}, {A} floats over {B}",
        "two shapes before {Z}: at the top {A}, under it {B}",
        "a picture with {A} in the upper half and {B} in the lower half, on {Z}",
        "{Z} with {B} underneath {A}",
    ),
    "row": (
        "{A}, {B} and {C} in a row from left to right on {Z}",
        "{B} between {A} on its left and {C} on its right, on {Z}",
        "on {Z}, from left to right: {A}, then {B}, then {C}",
        "three shapes side by side before {Z}: left {A}, middle {B}, right {C}",
        "on {Z} a row: {C} at its right end, {A} left, {B} between",
        "{Z} with {A} left of {B} and {C} right of it",
    ),
    "column": (
        "{A}, {B} and {C} in a column from top to bottom on {Z}",
        "{B} between {A} above it and {C} below it, on {Z}",
        "on {Z}, from top to bottom: {A}, then {B}, then {C}",
        "three shapes stacked before {Z}: top {A}, middle {B}, bottom {C}",
        "on {Z} a column: {C} at its foot, {A} on top, {B} between",
        "{Z} with {A} over {B} and {C} under it",
    ),
    "pyramid": (
        "{A} above {B} and {C}, on {Z}",
        "{B} at the bottom left and {C} at the bottom right of {A}, on {Z}",
        "on {Z}, {A} on top and below it {B} beside {C}",
        "three shapes in a triangle before {Z}: top {A}, lower left {B}, lower right {C}",
        "a picture with {B} left of {C} and {A} over both, on {Z}",
        "{Z} with {A} at the top, {B} bottom left, {C} bottom right",
    ),
}
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """A scene to draw. Two scenes with equal fields look the same, except for shifts of the shapes by a few pixels."""

    background: str
    arrangement: str
    place: str
    things: tuple[Thing, ...]


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[Any]]:
    return _rows(data.scenes), []


def _rows(config: Scenes) -> Iterator[AnnotationRow]:
    for split, scenes in plan(config).items():
        for i, scene in enumerate(scenes):
            name = f"scenes/{split}/{i:06d}"
            shift = _shift(scene, config.seed, split, i)
            spec = json.dumps({"scene": asdict(scene), "size": config.size, "shift": shift})
            yield AnnotationRow(name, tuple(captions(scene, config.seed, split, i)), split, "scenes", name, spec)


def plan(config: Scenes) -> dict[str, list[Scene]]:
    """Draw distinct scenes for all splits. Test and val come first, so they do not depend on the size of train."""

    earlier: set[Scene] = set()
    drawn: dict[str, list[Scene]] = {}
    for split in ("test", "val", "train"):
        drawn[split] = []
        for i in range(getattr(config, split)):
            draws = generator(config.seed, f"scene/{split}", i)
            scene = _draw_scene(draws)
            while scene in earlier:
                scene = _draw_scene(draws)
            earlier.add(scene)
            drawn[split].append(scene)
    return {split: drawn[split] for split in ("train", "val", "test")}


def captions(scene: Scene, seed: int, split: str, index: int) -> list[str]:
    """Return five different captions of a scene, with random wording."""

    draws = generator(seed, f"scene captions/{split}", index)
    sentences = SENTENCES[scene.arrangement]
    chosen = torch.randperm(len(sentences), generator=draws)[:5].tolist()
    return [_sentence(sentences[k], scene, draws) for k in chosen]


def draw(spec: str) -> bytes:
    """Draw the scene of a row and return the image as PNG bytes; `spec` is the JSON in `AnnotationRow.drawing`."""
    picture = json.loads(spec)
    scene, size, shift = picture["scene"], picture["size"], picture["shift"]
    side = size * _SUPERSAMPLING
    arrangement = scene["arrangement"]
    centres = (PLACES[scene["place"]],) if arrangement == "single" else ARRANGEMENTS[arrangement]
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    for thing, (x, y), (dx, dy) in zip(scene["things"], centres, shift, strict=True):
        radius = RADIUS[arrangement] * side * (1.0 if thing["size"] == "large" else 0.6)
        mask = _mask(thing["shape"], (x + dx) * side, (y + dy) * side, radius, side)
        canvas.paste(_ink(COLOURS[thing["colour"]], thing["texture"], side), mask=mask)
    out = io.BytesIO()
    canvas.resize((size, size), Image.Resampling.BOX).save(out, "PNG")
    return out.getvalue()


def _pick(options: Iterable[T], draws: torch.Generator) -> T:
    choices = tuple(options)
    return choices[int(torch.randint(len(choices), (), generator=draws))]


def _draw_scene(draws: torch.Generator) -> Scene:
    # Half of all scenes have two shapes; the other half have one or three.
    arrangement = _pick(("single", *2 * ("left_right", "above_below"), "row", "column", "pyramid"), draws)
    place = _pick(PLACES, draws) if arrangement == "single" else ""
    number = 1 if arrangement == "single" else len(ARRANGEMENTS[arrangement])
    things = tuple(
        Thing(_pick(COLOURS, draws), _pick(SHAPES, draws), _pick(SIZES, draws), _pick(TEXTURES, draws))
        for _ in range(number)
    )
    return Scene(_pick(BACKGROUNDS, draws), arrangement, place, things)


def _shift(scene: Scene, seed: int, split: str, index: int) -> list[list[float]]:
    """Return a random shift for each shape, of up to 2 % of the image side, so that positions vary between images."""

    draws = generator(seed, f"scene shift/{split}", index)
    return ((torch.rand(len(scene.things), 2, generator=draws) - 0.5) * 0.04).tolist()


def _sentence(sentence: str, scene: Scene, draws: torch.Generator) -> str:
    short = len(scene.things) == 3  # this keeps captions below 30 words, the limit of the papers
    names = {letter: _phrase(thing, short, draws) for letter, thing in zip("ABC", scene.things, strict=False)}
    background = _pick(("a {} background", "a {} ground", "a {} backdrop"), draws).format(scene.background)
    return sentence.format(**names, Z=background, place=scene.place)


def _phrase(thing: Thing, short: bool, draws: torch.Generator) -> str:
    size, colour, shape = _pick(SIZES[thing.size], draws), thing.colour, thing.shape
    if thing.texture == "plain":
        return _pick((f"a {size} {colour} {shape}", f"a {size} plain {colour} {shape}"), draws)
    mark = {"striped": "stripes", "dotted": "dots"}[thing.texture]
    before, after = f"a {size} {thing.texture} {colour} {shape}", f"a {size} {colour} {shape} with {mark}"
    return before if short else _pick((before, after), draws)


def _mask(shape: str, x: float, y: float, r: float, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=0)
    else:
        for corners in POLYGONS[shape]:
            pen.polygon([(x + r * px, y + r * py) for px, py in corners], fill=255)
    return mask


POLYGONS: dict[str, list[list[tuple[float, float]]]] = {
    "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "triangle": [[(0, -1), (1, 0.8), (-1, 0.8)]],
    "diamond": [[(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]],
    "cross": [
        [(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)],
        [(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)],
    ],
    "star": [
        [
            (length * math.sin(math.pi * k / 5), -length * math.cos(math.pi * k / 5))
            for k, length in enumerate([1.1, 0.45] * 5)
        ]
    ],
    "heart": [
        [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in (2 * math.pi * k / 48 for k in range(48))
        ]
    ],
}
"""Corners of each shape: positions relative to the centre of the shape, in units of its radius."""


def _ink(colour: tuple[int, int, int], texture: str, side: int) -> Image.Image:
    """Return an image filled with a colour and a texture: light stripes or dots, twelve per image side."""
    ink = Image.new("RGB", (side, side), colour)
    if texture == "plain":
        return ink
    light = tuple(255 - (255 - v) // 4 for v in colour)
    pen, step = ImageDraw.Draw(ink), side / 12
    for k in range(13):
        if texture == "striped":
            pen.rectangle((0, k * step, side, (k + 0.45) * step), fill=light)
        else:
            for j in range(13):
                x, y, r = (k + 0.5 * (j % 2)) * step, j * step, step * 0.28
                pen.ellipse((x - r, y - r, x + r, y + r), fill=light)
    return ink


SOURCE = AnnotationSource(rows, lambda root, drawing: draw(drawing))
