"""Pretrained models without a network: where they are found, what identifies them, and messages on missing files."""

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
    """Fixture: set the Hugging Face client offline, with an empty cache in `tmp_path/hub`, so no test can download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return tiny_parts.clip(folder / "clip", licence="mit"), tiny_parts.stable_unclip(folder / "unclip")


def in_cache(folder, cache, commit="c0ffee", name=HUB):
    """Copy the model in `folder` into `cache`, in the layout of the Hugging Face client; return the copy's folder."""
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, entry / "snapshots" / commit)


def test_a_complete_folder_has_a_content_hash_and_a_licence(models, tmp_path):
    clip, unclip = (shutil.copytree(path, tmp_path / path.name) for path in models)
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
    tiny_parts.clip(clip, seed=9)  # the files keep their sizes but hold different weights
    assert parts[0].identity() != before
    moved = shutil.copytree(models[0], tmp_path / "elsewhere")
    assert clip_part(str(moved)).identity() == before


def test_missing_files_of_a_folder_are_listed(models, tmp_path):
    clip, unclip = (shutil.copytree(path, tmp_path / path.name) for path in models)
    (clip / "model.safetensors").unlink()
    (clip / "tokenizer.json").unlink()
    (unclip / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(unclip / "scheduler")
    parts = [clip_part(str(clip)), PretrainedModel.of("decoder", str(unclip), "diffusers")]
    assert parts[0].missing_files() == ["weights (*.safetensors)", "tokenizer.json|vocab.json"]
    assert parts[1].missing_files() == ["scheduler/", "unet/weights (*.safetensors)"]
    with pytest.raises(ValueError, match=r"2 pretrained model\(s\) are missing") as error:
        obtain(parts)
    assert f"folder {clip}: it lacks weights" in str(error.value) and "scheduler/" in str(error.value)
    gone = clip_part(str(tmp_path / "nowhere"))
    assert gone.missing_files() == ["all files"] and "the folder does not exist" in faults([gone])[0]
    with pytest.raises(ValueError, match="folder does not exist"):
        gone.folder()


def test_split_weights_are_complete_when_all_parts_exist(models, tmp_path):
    clip = shutil.copytree(models[0], tmp_path / "clip")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (clip / "model.safetensors").rename(clip / names[0])
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert clip_part(str(clip)).missing_files() == [names[1]]
    (clip / names[1]).write_bytes(b"rest")
    assert clip_part(str(clip)).missing_files() == []


def test_a_cached_hub_id_is_identified_by_its_commit(models, tmp_path):
    snapshot = in_cache(models[0], tmp_path / "hub")
    in_cache(models[0], tmp_path / "hub", OLD)
    (tmp_path / "hub" / "models--nobody--tiny-clip" / "refs" / "main").write_text("c0ffee")
    part = clip_part(HUB)
    assert part.folder() == snapshot and part.identity() == "c0ffee" and not part.is_local
    assert clip_part(f"{HUB}@{OLD}").identity() == OLD
    assert part.facts()["id"] == HUB and part.facts()["licence"] == "mit"
    (snapshot / "model.safetensors").unlink()  # an interrupted download leaves such a folder
    assert part.missing_files() == ["weights (*.safetensors)"]


def test_without_a_network_a_missing_hub_id_is_reported_with_its_size_and_remedy():
    part = clip_part("openai/clip-vit-large-patch14@abc", "distill.options.features: clip:FOLDER")
    (line,) = faults([part])
    for words in ("clip: openai/clip-vit-large-patch14@abc", "1.7 GB", "offline mode", "hf download", "--revision abc"):
        assert words in line
    assert line.endswith("give a folder with this model (distill.options.features: clip:FOLDER)")
    assert summary(part)["missing"] == ["all files"] and summary(part)["bytes"] == 1_710_000_000
    with pytest.raises(ValueError, match=r"1 pretrained model\(s\) are missing"):
        obtain([part])


@contextlib.contextmanager
def hub_of(folder):
    """Serve `folder` as commit `OLD` of model `HUB` from a local imitation of the Hugging Face hub; yield the URL."""

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
            """Do nothing, so that requests are not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


SCRIPT = """
import sys
from rmdd.models.clip import clip_part
from rmdd.models.pretrained import faults, obtain
part = clip_part(sys.argv[1])
before = part.missing_files()
assert faults([part]) == []
obtain([part])
print(before, part.identity(), sorted(p.name for p in part.folder().iterdir()))
"""


@pytest.mark.parametrize("name", [HUB, f"{HUB}@{OLD}"])
def test_a_downloaded_model_is_available_offline(models, tmp_path, name):
    clip = shutil.copytree(models[0], tmp_path / "clip")
    (clip / "tf_model.h5").write_bytes(b"weights of another library")
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}

    def run_script(**environment):
        command = [sys.executable, "-c", SCRIPT, name]
        environment = usual | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    files = sorted(p.name for p in models[0].iterdir())
    with hub_of(clip) as address:
        assert run_script(HF_ENDPOINT=address) == f"['all files'] {OLD} {files}"
    assert run_script(HF_HUB_OFFLINE="1") == f"[] {OLD} {files}"


def test_only_files_needed_for_loading_are_selected_for_download():
    flat = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"]
    assert wanted(flat, "transformers") == ["README.md", "config.json", "model.safetensors"]
    folders = ["model_index.json", "all.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
    folders += ["unet/diffusion_pytorch_model.fp16.bin", "vae/config.json", "vae/model.ckpt"]
    folders += [f"text/model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["text/model.safetensors.index.json"]
    selected = set(wanted(folders, "diffusers"))
    assert selected == set(folders) - {"all.safetensors", "unet/diffusion_pytorch_model.fp16.bin", "vae/model.ckpt"}


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
def test_the_licence_is_read_from_the_model_card(tmp_path, head, licence):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext --- text\n")
    assert licence_of(tmp_path) == licence
    (tmp_path / "README.md").write_text("no metadata\n---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) is None
