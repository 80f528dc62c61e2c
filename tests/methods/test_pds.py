"""PDS from shards to an evaluated student, with tiny models in folders as written by `save_pretrained`."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_parts
import torch
import yaml
from PIL import Image
from processes import Rmdd
from safetensors.numpy import load_file
from tiny import go
from transformers import CLIPModel, CLIPProcessor

import rmdd
from rmdd import config
from rmdd.comparisons.coreset import coreset
from rmdd.config import Captions
from rmdd.core.progress import Progress
from rmdd.core.storage import run_folder
from rmdd.coresets.rows import Rows
from rmdd.data.captions import clean
from rmdd.data.decode import decode
from rmdd.data.images import denormalise
from rmdd.generate.decode import StableUnclip
from rmdd.generate.encoders import identity_of
from rmdd.methods.pds import decoder_of
from rmdd.pipeline import open_pipeline
from rmdd.runs.absolute import with_absolute_paths
from rmdd.runs.paths import paths_of
from rmdd.runs.preflight import examine, problems_of

PAIRS = 6
TINY = tiny.changed(
    data={"scenes": {"size": 24}},
    experts={"epochs": 1},
    evaluate={"epochs": 1, "students": 1, "baseline_draws": 1},
) | {"distill": {"method": "pds", "budget": PAIRS, "phases": [{"pairs": PAIRS, "iterations": 1}]}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {
        "features": f"clip:{tiny_parts.clip(folder / 'clip', licence='mit')}",
        "decoder": str(tiny_parts.stable_unclip(folder / "unclip", licence="openrail++")),
        "steps": 2,
        "dtype": "float32",
        "starts": 2,
    }


def raw(storage, **options):
    return tiny.stored(storage, TINY, distill={**TINY["distill"], "options": options})


def load(storage, **options):
    return config.load(raw(storage, **options))


def images_of(folder):
    return [p.read_bytes() for p in sorted((folder / "pairs").glob("*.png"))]


def features_in(storage):
    return [p for p in (storage / "cache").glob("sides-*") if p.is_dir()]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Fixture: the storage folder and the result of a complete PDS run."""
    storage = tmp_path_factory.mktemp("runs")
    return storage, go(load(storage, **parts), "all")


def test_shards_become_a_set_with_real_captions_and_a_student(finished, parts):
    storage, result = finished
    run = load(storage, **parts)
    assert set(result.evaluation["table"]) == {"random", "pds", "full"}
    loaded = rmdd.load(result.set)
    (subset,) = loaded.subsets
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        split, item = pipeline.prepared_split("train").split, pipeline.item()
    assert subset.pairs == PAIRS and subset.kind == "identity" and set(subset.captions) <= set(split.captions)
    assert [split.captions[i] for i in json.loads((item.paths.phase(0) / "records.json").read_text())] == list(
        subset.captions
    )
    pictures = denormalise(subset.images, loaded.mean, loaded.std).permute(0, 2, 3, 1).numpy()

    shown = [np.asarray(Image.open(p)) for p in sorted((item.paths.phase(0) / "pairs").glob("*.png"))]
    assert (np.stack(shown) == pictures).all()
    recorded = {part["role"]: part for part in loaded.provenance["parts"]}
    assert recorded["clip"]["licence"] == "mit" and recorded["decoder"]["revision"].startswith("sha256:")
    assert loaded.provenance["generated"]["phase-0"]["kept"] == len(split.captions) - int(0.2 * len(split.captions))
    card = (result.set / "README.md").read_text()
    assert "openrail++" in card and "no safety checker" in card and recorded["decoder"]["revision"] in card


def test_images_are_the_decoded_prototypes(finished, parts):

    storage, _ = finished
    run = load(storage, **parts)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        folder = pipeline.item().paths.phase(0)
    requests = json.loads((folder / "requests.json").read_text())
    rows = load_file(folder / "requests.safetensors")["embedding"]
    assert (
        rows.shape == (PAIRS, tiny_parts.D) and np.linalg.norm(rows, axis=1).std() > 1e-4
    )  # the prototypes must not have unit length
    options = rmdd.methods.find("pds")(run).options

    decoder = decoder_of(options, Path(parts["decoder"]), torch.device("cpu"))
    assert isinstance(decoder, StableUnclip)
    decoded = decoder.decode([r | {"embedding": torch.from_numpy(rows[r["index"]])} for r in requests[: options.batch]])

    for i, image in enumerate(decoded):
        assert (np.asarray(image) == np.asarray(Image.open(folder / "pairs" / f"{i:06d}.png"))).all()


def test_another_storage_gives_the_same_bytes_and_features_are_computed_once(finished, parts, tmp_path):
    storage, _ = finished
    run = load(tmp_path, **parts)
    (folder,) = go(run, "distill")
    with open_pipeline(load(storage, **parts), Progress(quiet=True)) as pipeline:
        first = pipeline.item().paths
    assert images_of(folder) == images_of(first.phase(0)) and len(images_of(folder)) == PAIRS
    assert (folder / "set-000001.safetensors").read_bytes() == first.set(0, 1).read_bytes()
    (sides,) = features_in(tmp_path)
    stamps = {p.name: p.stat().st_mtime_ns for p in sides.rglob("*.npy")}
    (other,) = go(load(tmp_path, **{**parts, "rm_ratio": 0.5, "decode": "nearest", "decoder": None}), "distill")
    assert other.parent != folder.parent  # the pruning ratio is part of the phase's hash
    assert stamps == {p.name: p.stat().st_mtime_ns for p in sides.rglob("*.npy")}
    assert features_in(tmp_path) == [sides]
    chosen = coreset(run, method="clip_score", encoder=parts["features"], pairs=3, progress=Progress(quiet=True))
    assert len(chosen.records) == 3 and features_in(tmp_path) == [sides]


def test_images_are_embedded_once_as_clip_itself_does(finished, parts):

    storage, _ = finished
    with open_pipeline(load(storage, **parts), Progress(quiet=True)) as pipeline:
        item, train = pipeline.item(), pipeline.prepared_split("train")
    folder = item.paths.cache / f"sides-{config.hash_value(identity_of(item.feature_source, train, parts['features']))}"
    images, texts = Rows.open(folder / "images"), Rows.open(folder / "texts")
    assert (len(images), len(texts)) == (12, len(train.split.captions)) and images.width == tiny_parts.D
    clip = parts["features"].removeprefix("clip:")
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    rule = {name: getattr(item.run.data, name) for name in ("max_pixels", "background")}
    picture = decode(train.split.encoded(7), **rule)
    caption = clean(train.split.captions[3].upper() + "!", Captions())
    inputs = processor(text=[caption], images=[picture], return_tensors="pt", truncation=True, max_length=77)
    with torch.no_grad():
        out = model(**inputs)
        raw_image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert np.allclose(images.at([7]), raw_image.numpy(), atol=1e-5)
    direction = texts.at([3])[0] / np.linalg.norm(texts.at([3])[0])
    assert np.allclose(direction, out.text_embeds[0].detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"features": "tower", "rm_ratio": 0, "repeats": "forbid"},
        {"features": "expert:0", "texts": "prototypes", "repeats": "forbid"},
    ],
)
def test_the_nearest_real_images_need_no_pretrained_models(finished, options, tmp_path):
    storage = shutil.copytree(finished[0], tmp_path / "runs")
    run = load(storage, decode="nearest", starts=2, **options)
    assert problems_of(run) == [] and rmdd.methods.find("pds")(run).parts() == []
    result = go(run, "all")
    loaded = rmdd.load(result.set)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        train = pipeline.prepared_split("train")
    real = {image.tobytes() for image in np.asarray(train.split.images)}
    shown = denormalise(loaded.subsets[0].images, loaded.mean, loaded.std).numpy()
    assert {image.tobytes() for image in shown} <= real and len({image.tobytes() for image in shown}) == PAIRS
    captions = loaded.subsets[0].captions
    assert len(set(captions)) == PAIRS and set(captions) <= set(train.split.captions)
    rows = train.texts[[train.split.captions.index(c) for c in captions]]
    assert np.array_equal(loaded.subsets[0].texts.numpy(), rows) == (options.get("texts") != "prototypes")
    assert "parts" not in loaded.provenance and "real ones" in (result.set / "README.md").read_text()


def test_a_killed_decoding_resumes_with_the_same_bits(finished, parts, tmp_path):
    storage = shutil.copytree(finished[0], tmp_path / "runs")
    slow = {**parts, "steps": 25, "batch": 1}
    untouched = shutil.copytree(finished[0], tmp_path / "untouched")
    (uninterrupted,) = go(load(untouched, **slow), "distill")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw(storage, **slow)))
    process = Rmdd("distill", tmp_path / "run.yaml", "--quiet", HF_HUB_OFFLINE="1")
    folder = storage / "phases" / uninterrupted.parent.name / "phase-0"
    while len(images_of(folder)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    finished_pairs = {p.name: p.stat().st_mtime_ns for p in (folder / "pairs").glob("*.json")}
    assert 0 < len(finished_pairs) < PAIRS and not (folder / "set-000001.safetensors").exists()
    go(load(storage, **slow), "distill")
    assert images_of(folder) == images_of(uninterrupted)
    assert {n: (folder / "pairs" / n).stat().st_mtime_ns for n in finished_pairs} == finished_pairs
    names = ["set-000001.safetensors", "start.safetensors", "captions.json", "records.json", "parts.json", "facts.json"]
    assert all((folder / n).read_bytes() == (uninterrupted / n).read_bytes() for n in names)


def test_missing_pretrained_models_stop_a_run_before_any_work(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = load(tmp_path / "runs")
    models = ["openai/clip-vit-large-patch14", "stabilityai/stable-diffusion-2-1-unclip-small"]
    assert all(name in line for name, line in zip(models, problems_of(run), strict=True))
    with pytest.raises(config.ConfigError, match="2 mistake") as error:
        go(run, "all")
    assert all(name in str(error.value) for name in models) and not (tmp_path / "runs" / "data").exists()
    assert [part["missing"] for part in examine(run)["parts"]] == [["all files"]] * 2
    complete = examine(load(tmp_path / "runs", **parts))["parts"]
    assert [(p["role"], p["missing"], p["licence"]) for p in complete] == [
        ("clip", [], "mit"),
        ("decoder", [], "openrail++"),
    ]
    wide = tiny_parts.clip(tmp_path / "wide", width=32)
    (line,) = problems_of(load(tmp_path / "runs", **{**parts, "features": f"clip:{wide}"}))
    assert "embeddings of width 32" in line and "needs width 24" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "tower"}, "reads CLIP embeddings, but distill.options.features is tower"),
        ({"features": "tower", "decode": "nearest"}, "set distill.options.rm_ratio to 0"),
        ({"features": "expert:1", "decode": "nearest"}, "the run trains 1 experts"),
        ({"decode": "nearest", "decoder": "x/y"}, "needs no decoder"),
        ({"steps": 0, "speed": 1}, "distill.options.speed"),
    ],
)
def test_invalid_options_are_rejected(tmp_path, options, words):
    with pytest.raises(config.ConfigError, match=words):
        load(tmp_path, **options)


def test_folders_of_a_run_file_become_absolute(parts, tmp_path, monkeypatch):
    decoder = Path(parts["decoder"])
    monkeypatch.chdir(decoder.parent)
    run = with_absolute_paths(load(tmp_path, **{**parts, "features": "clip:./clip", "decoder": f"./{decoder.name}"}))
    options = run.distill.options
    assert (options["features"], options["decoder"], options["dtype"]) == (
        parts["features"],
        parts["decoder"],
        "float32",
    )
    hub = with_absolute_paths(load(tmp_path, features="clip:a/b@c", decoder="d/e")).distill.options
    assert (hub["features"], hub["decoder"]) == ("clip:a/b@c", "d/e")


def test_phase_folders_depend_on_the_bytes_of_the_pretrained_models(finished, parts, tmp_path):
    storage, _ = finished
    run = load(storage, **parts)
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        dataset = pipeline.ingest()
    before = paths_of(run, dataset)
    clip = shutil.copytree(parts["features"].removeprefix("clip:"), tmp_path / "clip")
    other = {**parts, "features": f"clip:{tiny_parts.clip(clip, seed=5)}"}
    again = paths_of(load(storage, **other), dataset)
    assert again.phases != before.phases and again.store == before.store and again.baseline == before.baseline
    assert run_folder(run).is_dir()


@pytest.mark.ray
def test_actors_make_the_same_bits(ray_local, finished, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("rmdd.generate.prototypes.RANKS_FROM", 0)
    storage = shutil.copytree(finished[0], tmp_path / "runs")
    more = {**parts, "batch": 2, "rm_ratio": 0.1}
    (alone,) = go(load(shutil.copytree(finished[0], tmp_path / "alone"), **more), "distill")
    run_file = raw(storage, **more)
    run_file["runtime"] = {"storage": str(storage), "ray": "on", "num_cpus": 2, "workers": 2, "track": "none"}
    (there,) = go(config.load(run_file), "distill")
    assert images_of(there) == images_of(alone) and len(images_of(there)) == PAIRS
    name = "set-000001.safetensors"
    assert there.parent.name == alone.parent.name and (there / name).read_bytes() == (alone / name).read_bytes()
