"""Pictures as arrays: on one background, in grey or RGB, at one size."""

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageColor, ImageOps

from diffusion_jax.typing import InputError, require

Fit = Literal["stretch", "pad", "crop"]
Channels = Literal[3, 1]
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
PIXELS = 2**26  # the largest image that is decoded has 8192 x 8192: 256 MB
MAX_SIDE = 1024  # pixels
BOX = Image.Resampling.BOX


class Frame(NamedTuple):
    """What pictures become: see the function frame. size: (height, width), or None to keep it."""

    size: tuple[int, int] | None = None
    fit: str = "stretch"
    background: tuple[int, ...] = (255, 255, 255)
    channels: int = 3

    def array(self, picture: Image.Image) -> UInt8[ndarray, "height width channel"]:
        """Return a picture on the background, at the size, as pixels."""
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, self.background)
        image = self._fitted(Image.alpha_composite(ground, layer).convert("RGB"))
        pixels = np.asarray(image if self.channels == 3 else image.convert("L"))
        return pixels.reshape(*pixels.shape[:2], self.channels)

    def arrays(self, images: UInt8[ndarray, "N h w channel"]) -> UInt8[ndarray, "N H W channel"]:
        """Return images at the size."""
        if not self.size:
            return images
        frame = self._replace(channels=images.shape[-1])
        pictures = images[..., 0] if frame.channels == 1 else images
        return np.stack([frame.array(Image.fromarray(each)) for each in pictures])

    def _fitted(self, image: Image.Image) -> Image.Image:
        height, width = self.size or image.size[::-1]
        size = width, height
        if image.size == size:
            return image
        if self.fit == "stretch":
            return image.resize(size, BOX)
        if self.fit == "crop":
            return ImageOps.fit(image, size, BOX)
        if image.width > width or image.height > height:
            image = ImageOps.contain(image, size, BOX)
        padded = Image.new("RGB", size, self.background)
        padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return padded


WHOLE = Frame()


def frame(size: tuple[int, ...], fit: str, background: str, channels: int = 3) -> Frame:
    """Return a frame from the options of a data spec.

    size: one side of a square, or height,width; 0 keeps the size. fit: "stretch" scales both sides,
    "pad" adds a border and never enlarges, "crop" scales and cuts off what is too long. background:
    the colour of transparent pixels and of borders. Raise InputError if an option is invalid.
    """
    given = ",".join(map(str, size))
    fits = size == (0,) or (len(size) in (1, 2) and all(1 <= side <= MAX_SIDE for side in size))
    require(fits, f"size={given}: give a side in 0..{MAX_SIDE}, or height,width; 0 keeps the size")
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError:
        words = f"background={background}: give a colour such as black or #ff00ff"
        raise InputError(words) from None
    return Frame(None if size == (0,) else (size[0], size[-1]), fit, colour, channels)


def read_picture(
    path: Path, frame: Frame, data: bytes | None = None
) -> UInt8[ndarray, "height width channel"]:
    """Read an image file, turned by its EXIF orientation; of an animation, the first frame.

    data: the contents of the file, if they are known. Raise InputError naming the path if the
    file is damaged, is larger than PIXELS, or has more than 8 bits a channel.
    """
    file = path if data is None else io.BytesIO(data)
    fits = data is not None or path.is_file()
    require(fits, f"{path} cannot be read as an image: it is not a file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as opened:
            fits = math.prod(opened.size) <= PIXELS
            require(fits, f"{path} has size {opened.size}: more than {PIXELS} pixels")
            deep = opened.mode[0] in "IF"  # Pillow would cut its values off at 255
            require(not deep, f"{path} is an image of more than 8 bits a channel: give it 8")
            return frame.array(ImageOps.exif_transpose(opened))
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as an image: {error}") from None


def stack(images: Iterable[tuple[Path, ndarray]]) -> UInt8[ndarray, "N height width channel"]:
    """Stack images of one size. Raise InputError naming the first that has a different size."""
    found: list[ndarray] = []
    first = Path()
    for path, image in images:
        first = first if found else path
        found.append(image)
        sizes = image.shape[:2], found[0].shape[:2]
        require(
            sizes[0] == sizes[1],
            f"{path} has size {sizes[0]} where {first} has {sizes[1]}: bring them to one size with "
            "size=N, and fit=pad or fit=crop if they should keep their proportions",
        )
    return np.stack(found)
