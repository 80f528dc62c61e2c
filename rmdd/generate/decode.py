"""Image decoders. A decoder turns the request of a pair (a caption, an embedding, ...) into the image of this pair.

A decoder is constructed in the worker that uses it. Each image has its own random generator, seeded by the number of
the pair, so an image does not depend on other images. The images of a block are generated together. A block is a range
of pair numbers, so a resumed run generates the same blocks. Shapes: B images of a block, D features of an embedding.
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
"""What a decoder needs for one image: `index` and `seed` of the pair, and inputs such as `caption` or `embedding`."""
Precision = Literal["float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential"]

PAIRS = "pairs"
REQUESTS = "requests"


@runtime_checkable
class Decoder(Protocol):
    """An image decoder. Its images may have any size; it draws random numbers from `random_of(request)`."""

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        """Return an image for each request, in order. Raises `ValueError` that names the pair of an unusable image."""
        ...


def random_of(request: Request, what: str = "picture") -> torch.Generator:
    """Return the random generator for the image of a pair; it is on the CPU, so all devices use the same numbers."""
    return generator(request["seed"], what, request["index"])


class Nearest:
    """A baseline decoder that generates nothing: it returns the dataset image with the number `request["image"]`."""

    def __init__(self, split: Split):
        self.split = split

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        images = [self.split.some_images(np.array([r["image"]]))[0] for r in requests]
        return [Image.fromarray(np.ascontiguousarray(i.transpose(1, 2, 0))) for i in images]


class StableUnclip:
    """A decoder that runs Stable unCLIP on the caption and the unnormalised CLIP image embedding of each pair.

    `noise_level` is the diffusion time step that sets the strength of the noise added to embeddings. The pipeline has
    no safety checker. Raises `ValueError` unless embeddings have the number of features that the pipeline accepts.
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
        self.device = move_to_device(self.pipeline, device, offload)
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
    """A decoder that runs Karlo's unCLIP decoder and its two upscalers on embeddings; captions are not used.

    diffusers can no longer load the complete pipeline, so the models of the pipeline are loaded one by one.
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
            pipeline_class: Any = UnCLIPImageVariationPipeline
            self.pipeline = pipeline_class(**parts)
        self.device = move_to_device(self.pipeline, device, offload)
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


# -- helpers of the decoders -----------------------------------------------------------------------------------------


def width_of(folder: Path) -> int:
    """Return the width D of the embeddings that the unCLIP pipeline in `folder` accepts."""
    if (folder / "image_normalizer").is_dir():
        return int(read_json(folder / "image_normalizer" / "config.json")["embedding_dim"])
    return int(read_json(folder / "image_encoder" / "config.json")["projection_dim"])


def embeddings_of(requests: Sequence[Request], width: int) -> Float[Tensor, "B D"]:
    """Stack the `embedding` of each request, as float32. Raises `ValueError` unless each has `width` finite numbers."""
    rows = torch.stack([r["embedding"] for r in requests]).float()
    if rows.shape[1] != width:
        raise ValueError(
            f"the decoder takes embeddings of width {width}, found {rows.shape[1]}; compute them with the CLIP model "
            "that the decoder was made for"
        )
    for request, row in zip(requests, rows, strict=True):
        if not row.isfinite().all():
            raise ValueError(f"the embedding of pair {request['index']} is not finite; check the image features")
    return rows


def pictures(requests: Sequence[Request], images: Float[np.ndarray, "B H W 3"]) -> list[Image.Image]:
    """Convert pixels in [0, 1] to PIL images. Raises `ValueError` for non-finite pixels (float16 can overflow)."""
    for request, image in zip(requests, images, strict=True):
        if not np.isfinite(image).all():
            raise ValueError(
                f"the image of pair {request['index']} is not finite; use dtype bfloat16 or float32 for the decoder"
            )
    return [Image.fromarray(np.rint(255 * image).clip(0, 255).astype(np.uint8)) for image in images]


def move_to_device(pipeline: Any, device: torch.device, offload: Offload) -> torch.device:
    """Move a pipeline to a device; return the device. With `offload`, models or layers move only when they are used."""
    pipeline.set_progress_bar_config(disable=True)
    device = device if torch.cuda.is_available() else torch.device("cpu")
    if offload == "none" or device.type == "cpu":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    return device


# -- image files -----------------------------------------------------------------------------------------------------


class PictureWriter:
    """A worker that decodes one block of requests per call and writes each image to `<folder>/pairs`.

    An image is resized to `size` x `size` RGB pixels (Lanczos) and written as a PNG file; then its request is written
    as a JSON file. Raises `ValueError` for an image of one colour or without pixels.
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
                f"the image of pair {index} is empty or has one colour ({image.width} x {image.height}); the decoder "
                "failed: check its dtype and its model files"
            )
        native, redrawn = list(image.size), image.info.get("redrawn", 0)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        with atomic_path(picture_of(self.folder, index)) as temporary:
            image.save(temporary, "PNG")
        plain = {name: value for name, value in request.items() if not isinstance(value, Tensor)}
        about = plain | {"native": native, "request": request_hash(request)}
        if redrawn:
            about["redrawn"] = redrawn  # number of seeds tried before, which gave images of one colour
        write_json(picture_of(self.folder, index).with_suffix(".json"), about)


def picture_of(folder: Path, index: int) -> Path:
    return folder / PAIRS / f"{index:06d}.png"


def is_drawn(folder: Path, request: Request) -> bool:
    """Return whether `folder` holds an image that was generated from a request equal to `request`."""
    path = picture_of(folder, request["index"])
    about = path.with_suffix(".json")
    return path.is_file() and about.is_file() and read_json(about)["request"] == request_hash(request)


def request_hash(request: Request) -> str:
    """Return a hash of the JSON values and tensors of a request."""
    plain = {name: value for name, value in request.items() if not isinstance(value, Tensor)}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(request.keys() - plain.keys()):
        row = request[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(row.shape)} {row.dtype}".encode() + row.numpy().tobytes())
    return digest.hexdigest()[:32]


def write_requests(folder: Path, requests: Sequence[Values], tensors: dict[str, Tensor]) -> None:
    """Write the requests of all pairs to `folder`, as JSON values and as tensors with one row per pair."""
    if any(len(t) != len(requests) for t in tensors.values()):
        lengths = {n: len(t) for n, t in tensors.items()}
        raise ValueError(f"each tensor needs one row per pair: {len(requests)} pairs, found rows {lengths}")
    save_checked(folder / f"{REQUESTS}.safetensors", {n: t.contiguous() for n, t in tensors.items()}, REQUESTS, {})
    write_json(folder / f"{REQUESTS}.json", list(requests))


def read_requests(folder: Path) -> list[Request]:
    tensors, _ = load_checked(folder / f"{REQUESTS}.safetensors", REQUESTS)
    plain: list[Values] = read_json(folder / f"{REQUESTS}.json")
    return [{**values, **{name: rows[i] for name, rows in tensors.items()}} for i, values in enumerate(plain)]
