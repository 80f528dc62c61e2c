"""Pretrained parts: found, pinned, and missed, without a network."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_parts

from rmdd.models.clip import clip_part
from rmdd.models.pretrained import PretrainedModel, faults, licence_of, missing, obtain, summary, wanted

HUB = "nobody/tiny-clip"
OLD = "0ddba11" + 33 * "0"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty cache of the hub, and no network; `tmp_path/hub` is the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return tiny_parts.clip(folder / "clip", licence="mit"), tiny_parts.stable_unclip(folder / "unclip")


def in_cache(folder, cache, commit="c0ffee", name=HUB):
    """`folder` as the hub's client keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, place / "snapshots" / commit)


def test_a_folder_is_whole_pinned_by_its_bytes_and_tells_its_licence(made, tmp_path):
    clip, unclip = (shutil.copytree(path, tmp_path / path.name) for path in made)
    parts = [clip_part(str(clip)), PretrainedModel.of("decoder", str(unclip), "diffusers")]
    assert missing(parts) == faults(parts) == []
    obtain(parts)
    facts = [summary(part) for part in parts]
    assert [f["licence"] for f in facts] == ["mit", None] and facts[0]["id"] == "clip" and facts[0]["local"]
    assert facts[0]["bytes"] == sum(p.stat().st_size for p in clip.iterdir() if p.name != "README.md")
    assert all(f["revision"].startswith("sha256:") and len(f["revision"]) == 71 for f in facts)
    before = parts[0].identity()
    (clip / "README.md").write_text("another card\n")
    assert parts[0].identity() == before and parts[0].facts()["licence"] is None
    tiny_parts.clip(clip, seed=9)  # the same shapes and sizes, other numbers
    assert parts[0].identity() != before
    moved = shutil.copytree(made[0], tmp_path / "elsewhere")
    assert clip_part(str(moved)).identity() == before


def test_what_a_folder_lacks_is_named(made, tmp_path):
    clip, unclip = (shutil.copytree(path, tmp_path / path.name) for path in made)
    (clip / "model.safetensors").unlink()
    (clip / "tokenizer.json").unlink()
    (unclip / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(unclip / "scheduler")
    parts = [clip_part(str(clip)), PretrainedModel.of("decoder", str(unclip), "diffusers")]
    assert parts[0].lacking() == ["weights (*.safetensors)", "tokenizer.json|vocab.json"]
    assert parts[1].lacking() == ["scheduler/", "unet/weights (*.safetensors)"]
    with pytest.raises(ValueError, match=r"2 pretrained part\(s\) are missing") as error:
        obtain(parts)
    assert f"folder {clip}: it lacks weights" in str(error.value) and "scheduler/" in str(error.value)
    gone = clip_part(str(tmp_path / "nowhere"))
    assert gone.lacking() == ["all of it"] and "there is no such folder" in faults([gone])[0]
    with pytest.raises(ValueError, match="no such folder"):
        gone.folder()


def test_weights_in_parts_are_whole_when_all_are_there(made, tmp_path):
    clip = shutil.copytree(made[0], tmp_path / "clip")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (clip / "model.safetensors").rename(clip / names[0])
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert clip_part(str(clip)).lacking() == [names[1]]
    (clip / names[1]).write_bytes(b"rest")
    assert clip_part(str(clip)).lacking() == []


def test_a_hub_id_is_taken_from_the_cache_and_pinned_by_its_commit(made, tmp_path):
    snapshot = in_cache(made[0], tmp_path / "hub")
    in_cache(made[0], tmp_path / "hub", OLD)
    (tmp_path / "hub" / "models--nobody--tiny-clip" / "refs" / "main").write_text("c0ffee")
    part = clip_part(HUB)
    assert part.folder() == snapshot and part.identity() == "c0ffee" and not part.is_local
    assert clip_part(f"{HUB}@{OLD}").identity() == OLD
    assert part.facts()["id"] == HUB and part.facts()["licence"] == "mit"
    (snapshot / "model.safetensors").unlink()  # a download that was cut off
    assert part.lacking() == ["weights (*.safetensors)"]


def test_without_network_a_missing_hub_id_is_told_with_its_size_and_a_way_out():
    part = clip_part("openai/clip-vit-large-patch14@abc", "distill.options.features: clip:FOLDER")
    (line,) = faults([part])
    for words in ("clip: openai/clip-vit-large-patch14@abc", "1.7 GB", "offline mode", "hf download", "--revision abc"):
        assert words in line
    assert line.endswith("give a folder that holds it (distill.options.features: clip:FOLDER)")
    assert summary(part)["missing"] == ["all of it"] and summary(part)["bytes"] == 1_710_000_000
    with pytest.raises(ValueError, match=r"1 pretrained part\(s\) are missing"):
        obtain([part])


@contextlib.contextmanager
def hub_of(folder):
    """The address of a hub that serves `folder` as `HUB`; OLD is its commit."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path, body, kind = self.path.partition("?")[0], b"", {"Content-Type": "application/json"}
            names = sorted(p.name for p in folder.iterdir())
            if f"{HUB}/resolve/" in path:
                body = (folder / path.rsplit("/", 1)[1]).read_bytes()
                kind = {"ETag": f'"{path.rsplit("/", 1)[1]}"', "X-Repo-Commit": OLD}
            elif f"{HUB}/tree/" in path:
                entry = {"type": "file", "oid": OLD}
                body = json.dumps([{**entry, "path": n, "size": (folder / n).stat().st_size} for n in names]).encode()
            else:
                body = json.dumps({"id": HUB, "sha": OLD, "siblings": [{"rfilename": n} for n in names]}).encode()
            self.send_response(200)
            for name, value in {**kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            """Nothing is summary."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


ASK = """
import sys
from rmdd.models.clip import clip_part
from rmdd.models.pretrained import faults, obtain
part = clip_part(sys.argv[1])
before = part.lacking()
assert faults([part]) == []
obtain([part])
print(before, part.identity(), sorted(p.name for p in part.folder().iterdir()))
"""


@pytest.mark.parametrize("name", [HUB, f"{HUB}@{OLD}"])
def test_what_was_fetched_from_a_hub_is_found_again_without_a_network(made, tmp_path, name):
    clip = shutil.copytree(made[0], tmp_path / "clip")
    (clip / "tf_model.h5").write_bytes(b"of another library")
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}

    def ask(**environment):
        words = [sys.executable, "-c", ASK, name]
        environment = usual | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    files = sorted(p.name for p in made[0].iterdir())
    with hub_of(clip) as address:
        assert ask(HF_ENDPOINT=address) == f"['all of it'] {OLD} {files}"
    assert ask(HF_HUB_OFFLINE="1") == f"[] {OLD} {files}"


def test_of_a_hub_only_what_is_loaded_is_fetched():
    flat = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"]
    assert wanted(flat, "transformers") == ["README.md", "config.json", "model.safetensors"]
    folders = ["model_index.json", "all.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
    folders += ["unet/diffusion_pytorch_model.fp16.bin", "vae/config.json", "vae/model.ckpt"]
    folders += [f"text/model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["text/model.safetensors.index.json"]
    found = wanted(folders, "diffusers")
    assert set(found) == set(folders) - {"all.safetensors", "unet/diffusion_pytorch_model.fp16.bin", "vae/model.ckpt"}


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: open-x", "open-x"),
        ("license: [a, b]", "a or b"),
        ("tags: [x]", None),
        ("license: {", None),
    ],
)
def test_licences_as_cards_name_them(tmp_path, head, licence):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext --- text\n")
    assert licence_of(tmp_path) == licence
    (tmp_path / "README.md").write_text("no metadata\n---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) is None
