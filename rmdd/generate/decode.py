"""From what is known of a pair to its picture: the real image nearest to a prototype, or a diffusion pipeline.

A decoder is made inside the worker that uses it. Every picture has a generator of its own, seeded by its pair, so it
does not depend on which were made before. Pictures of a block are made together; blocks are cut by pair number, so
that a resume makes the same ones. B pictures of a block, D width of the embedding space.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rmdd.core.files import atomic_path, read_json, write_json
from rmdd.core.seeding import generator
from rmdd.core.tensors import load_checked, save_checked
from rmdd.core.threads import torch_threads
from rmdd.data.splits import Split
from rmdd.execution.tasks import Values
from rmdd.models.pretrained import quiet

Request = dict[str, Any]
"""What a pair is made from: `index`, `seed`, and what its decoder reads, such as `caption` or a row `embedding`."""
Precision = Literal["float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential"]

PAIRS = "pairs"
REQUESTS = "requests"


@runtime_checkable
class Decoder(Protocol):
    """Makes pictures of any size; `random_of` gives the generator of each."""

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        """A picture for each request, in order. Raises `ValueError` that names a pair whose picture cannot be used."""
        ...


def random_of(request: Request, what: str = "picture") -> torch.Generator:
    """The generator of a pair, on the CPU, so that every device draws the same numbers."""
    return generator(request["seed"], what, request["index"])


class Nearest:
    """Real images as they are, as a baseline that makes nothing up; a request names its `image` by number."""

    def __init__(self, split: Split):
        self.split = split

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        images = [self.split.some_images(np.array([r["image"]]))[0] for r in requests]
        return [Image.fromarray(np.ascontiguousarray(i.transpose(1, 2, 0))) for i in images]


class StableUnclip:
    """Stable unCLIP: image embeddings of raw CLIP scale, noised to `noise_level`, and captions as prompts.

    The pipeline brings no safety checker. Raises `ValueError` for embeddings of another width than its normaliser's.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        steps: int = 100,
        guidance: float = 5.0,
        noise_level: int = 10,
        negative_prompt: str = "",
        dtype: Precision = "float32",
        offload: Offload = "none",
    ):
        from diffusers import StableUnCLIPImg2ImgPipeline

        with quiet("transformers", "diffusers"):
            self.pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True
            )
        self.dtype, self.width = getattr(torch, dtype), width_of(folder)
        self.device = placed(self.pipeline, device, offload)
        self.negative = negative_prompt
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance, "noise_level": noise_level}

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        output = self.pipeline(
            image_embeds=embeddings_of(requests, self.width).to(self.device, self.dtype),
            prompt=[r["caption"] for r in requests],
            negative_prompt=[self.negative] * len(requests),
            generator=[random_of(r) for r in requests],
            output_type="np",
            **self.options,
        )
        return pictures(requests, output.images)


class Karlo:
    """Karlo's unCLIP decoder with its two upscalers; it reads embeddings alone, no captions.

    diffusers cannot load this pipeline whole any more, so its parts are loaded one by one.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        steps: int = 25,
        guidance: float = 8.0,
        super_steps: int = 7,
        dtype: Precision = "float32",
        offload: Offload = "none",
    ):
        from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
        from diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation import UnCLIPImageVariationPipeline
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
        from transformers import (
            CLIPImageProcessor,
            CLIPTextModelWithProjection,
            CLIPTokenizer,
            CLIPVisionModelWithProjection,
        )

        models: dict[str, Any] = {
            "decoder": UNet2DConditionModel,
            "text_encoder": CLIPTextModelWithProjection,
            "text_proj": UnCLIPTextProjModel,
            "image_encoder": CLIPVisionModelWithProjection,
            "super_res_first": UNet2DModel,
            "super_res_last": UNet2DModel,
        }
        rest: dict[str, Any] = {
            "tokenizer": CLIPTokenizer,
            "feature_extractor": CLIPImageProcessor,
            "decoder_scheduler": UnCLIPScheduler,
            "super_res_scheduler": UnCLIPScheduler,
        }
        self.dtype, self.width = getattr(torch, dtype), width_of(folder)
        with quiet("transformers", "diffusers"):
            parts: dict[str, Any] = {
                n: kind.from_pretrained(folder / n, dtype=self.dtype).eval() for n, kind in models.items()
            }
            parts |= {n: kind.from_pretrained(folder / n) for n, kind in rest.items()}
            whole: Any = UnCLIPImageVariationPipeline
            self.pipeline = whole(**parts)
        self.device = placed(self.pipeline, device, offload)
        self.options = {
            "decoder_num_inference_steps": steps,
            "super_res_num_inference_steps": super_steps,
            "decoder_guidance_scale": guidance,
        }

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        output = self.pipeline(
            image_embeddings=embeddings_of(requests, self.width).to(self.device, self.dtype),
            generator=[random_of(r) for r in requests],
            output_type="np",
            **self.options,
        )
        return pictures(requests, output.images)


# -- what decoders share ---------------------------------------------------------------------------------------------


def width_of(folder: Path) -> int:
    """Width D of the embeddings that the unCLIP pipeline in `folder` takes."""
    if (folder / "image_normalizer").is_dir():
        return int(read_json(folder / "image_normalizer" / "config.json")["embedding_dim"])
    return int(read_json(folder / "image_encoder" / "config.json")["projection_dim"])


def embeddings_of(requests: Sequence[Request], width: int) -> Float[Tensor, "B D"]:
    """The rows `embedding` of some pairs, float32. Raises `ValueError` where they do not suit the decoder."""
    rows = torch.stack([r["embedding"] for r in requests]).float()
    if rows.shape[1] != width:
        raise ValueError(f"the decoder takes embeddings of width {width}, found {rows.shape[1]}; take its own CLIP")
    for request, row in zip(requests, rows, strict=True):
        if not row.isfinite().all():
            raise ValueError(f"the embedding of pair {request['index']} is not finite; look at the features")
    return rows


def pictures(requests: Sequence[Request], images: Float[np.ndarray, "B H W 3"]) -> list[Image.Image]:
    """Pixels in [0, 1] as pictures. Raises `ValueError` for those that are not finite (half precision overflows)."""
    for request, image in zip(requests, images, strict=True):
        if not np.isfinite(image).all():
            raise ValueError(
                f"the picture of pair {request['index']} is not finite; use dtype bfloat16 or float32 for the decoder"
            )
    return [Image.fromarray(np.rint(255 * image).clip(0, 255).astype(np.uint8)) for image in images]


def placed(pipeline: Any, device: torch.device, offload: Offload) -> torch.device:
    """Bring a pipeline to a device; with `offload` its parts wait in main memory until they are needed."""
    pipeline.set_progress_bar_config(disable=True)
    device = device if torch.cuda.is_available() else torch.device("cpu")
    if offload == "none" or device.type == "cpu":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    return device


# -- pairs, one file each --------------------------------------------------------------------------------------------


class PictureWriter:
    """A decoder at work: numbers of blocks to pictures in `<folder>/pairs`, a PNG and a JSON each, the latter last.

    Pictures are RGB of side `size` (Lanczos). Raises `ValueError` for a picture of one colour or without pixels.
    """

    def __init__(self, make: Callable[[], Decoder], folder: Path, batch: int, size: int, threads: int):
        self.folder, self.batch, self.size, self.threads = folder, batch, size, threads
        self.requests = read_requests(folder)
        self.decoder = make()

    def __call__(self, values: Values) -> Values:
        first = values["block"] * self.batch
        block = self.requests[first : first + self.batch]
        with torch_threads(self.threads), torch.inference_mode(), quiet("transformers", "diffusers"):
            images = self.decoder.decode(block)
        for request, image in zip(block, images, strict=True):
            if not is_drawn(self.folder, request):
                self._save(request, image)
        return {"pictures": len(block)}

    def _save(self, request: Request, image: Image.Image) -> None:
        index = request["index"]
        image = image.convert("RGB")
        if not image.width or not image.height or not np.asarray(image).reshape(-1, 3).std(axis=0).any():
            raise ValueError(
                f"the picture of pair {index} is empty or of one colour ({image.width} x {image.height}); the decoder "
                "failed: look at its precision and its parts"
            )
        native, redrawn = list(image.size), image.info.get("redrawn", 0)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        with atomic_path(picture_of(self.folder, index)) as temporary:
            image.save(temporary, "PNG")
        plain = {name: value for name, value in request.items() if not isinstance(value, Tensor)}
        about = plain | {"native": native, "request": request_hash(request)}
        if redrawn:
            about["redrawn"] = redrawn  # how many seeds gave one colour
        write_json(picture_of(self.folder, index).with_suffix(".json"), about)


def picture_of(folder: Path, index: int) -> Path:
    return folder / PAIRS / f"{index:06d}.png"


def is_drawn(folder: Path, request: Request) -> bool:
    """Whether the picture of a pair is there, made from the same request."""
    path = picture_of(folder, request["index"])
    about = path.with_suffix(".json")
    return path.is_file() and about.is_file() and read_json(about)["request"] == request_hash(request)


def request_hash(request: Request) -> str:
    """Of all that a pair is made from, rows of tensors too."""
    plain = {name: value for name, value in request.items() if not isinstance(value, Tensor)}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(request.keys() - plain.keys()):
        row = request[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(row.shape)} {row.dtype}".encode() + row.numpy().tobytes())
    return digest.hexdigest()[:32]


def write_requests(folder: Path, requests: Sequence[Values], tensors: dict[str, Tensor]) -> None:
    """What pairs are made from, for the workers: small values of each, and tensors whose row i belongs to pair i."""
    if any(len(t) != len(requests) for t in tensors.values()):
        raise ValueError(f"{len(requests)} pairs, and rows { ({n: len(t) for n, t in tensors.items()}) }")
    save_checked(folder / f"{REQUESTS}.safetensors", {n: t.contiguous() for n, t in tensors.items()}, REQUESTS, {})
    write_json(folder / f"{REQUESTS}.json", list(requests))


def read_requests(folder: Path) -> list[Request]:
    tensors, _ = load_checked(folder / f"{REQUESTS}.safetensors", REQUESTS)
    plain: list[Values] = read_json(folder / f"{REQUESTS}.json")
    return [{**values, **{name: rows[i] for name, rows in tensors.items()}} for i, values in enumerate(plain)]
