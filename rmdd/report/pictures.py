"""Pictures of the report as data URIs."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def data_uri(pixels: UInt8[np.ndarray, "3 H W"], side: int | None = None) -> str:
    """Return an image as a data URI: losslessly as PNG, or with at most `side` pixels per side as JPEG."""
    picture, buffer = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), io.BytesIO()
    if side is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(buffer, "jpeg", quality=82)
    else:
        picture.save(buffer, "png", optimize=True)
    kind = "png" if side is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
