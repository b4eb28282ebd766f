"""From the bytes that somebody sent to square pictures of ours: pure, in the thread of whoever calls.

Rules:
- The bytes alone say what they are; names and media types of the sender count for nothing.
- Sizes are read from the header and judged before a pixel is decoded.
- What is kept is encoded anew from pixels, so nothing else of the file survives: no position of a camera, no comment,
  no script, no second format hidden behind the first.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

# Each names a format that `Image.open` may be asked for; without these imports it would look through all it knows.
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from core.errors import FieldProblem, InvalidInput

FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
MEDIA_TYPE = "image/webp"
MAX_JPEG_PIXELS = 25_000_000  # a photo of a good camera; it is decoded at a part of its size
MAX_PIXELS = 12_500_000  # of the others, which are decoded whole, at four bytes a pixel, and WebP more than once
MAX_SIDE = 8_000
MAX_JPEG_SCANS = 200  # photos have one, progressive ones about ten; thousands keep a decoder busy for minutes
QUALITY = 85
MAX_PROFILE_BYTES = 1024 * 1024  # those of cameras and screens have some hundreds
RGB_PROFILE = slice(16, 20)  # of a colour profile: what its colours are made of (ICC.1:2022, section 7.2.6)
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
START_OF_SCAN = b"\xff\xda"
"""Never within what a scan holds, where a byte ff is followed by 00 or the mark of a restart."""

# Judged by us, before anything is decoded, and with an answer that says what was expected.
Image.MAX_IMAGE_PIXELS = None


def squares(content: bytes, sides: Sequence[int]) -> list[bytes]:
    """The middle of the picture as WebP, once for each side in pixels; what is smaller is not enlarged.

    The largest side comes first. Raises InvalidInput for whatever is not a JPEG, PNG or WebP picture of a size that
    can be taken. Of several frames it is the first.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_moderate(image, content)
            _require_whole(image, content)
            square = _square(image, sides[0])
    except InvalidInput:
        raise
    except Exception as error:
        # A decoder that is fed with rubbish may raise anything.
        raise refused("Expected a whole JPEG, PNG or WebP picture", "invalid_picture") from error
    made = []
    for side in sides:
        square = square if square.width <= side else square.resize((side, side), Image.Resampling.LANCZOS)
        made.append(_encoded(square))
    return made


def refused(message: str, kind: str) -> InvalidInput:
    return InvalidInput([FieldProblem(("body", "avatar"), message, kind)])


def _require_moderate(image: Image.Image, content: bytes) -> None:
    width, height = image.size
    most = MAX_JPEG_PIXELS if isinstance(image, JpegImagePlugin.JpegImageFile) else MAX_PIXELS
    if width > MAX_SIDE or height > MAX_SIDE or width * height > most:
        message = f"Expected at most {MAX_SIDE:,} pixels a side and {most:,} in all, got {width:,} × {height:,}"
        raise refused(message, "picture_too_large")
    if content.count(START_OF_SCAN) > MAX_JPEG_SCANS:
        raise refused(f"Expected a JPEG picture of at most {MAX_JPEG_SCANS} scans", "picture_too_complex")


def _require_whole(image: Image.Image, content: bytes) -> None:
    # The decoder is content with a PNG whose last bytes are missing.
    if isinstance(image, PngImagePlugin.PngImageFile) and PNG_END not in content:
        raise refused("Expected a whole picture: the end is missing", "invalid_picture")


def _square(image: Image.Image, side: int) -> Image.Image:
    """The middle of the picture, upright, `side` pixels wide or less, as RGB or RGBA."""
    # A JPEG can be decoded at an eighth, a quarter or half of its size; twice what is needed keeps it sharp.
    image.draft(image.mode, (side * 2, side * 2))
    orientation = image.getexif().get(0x0112, 1)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge)
    image.load()
    # Cut out first: what is converted is a copy, and this one is never larger than the picture.
    square = _as_colours(image if width == height else image.crop(box))
    target = min(edge, side)
    if edge > target:
        square = square.resize((target, target), Image.Resampling.LANCZOS, reducing_gap=3.0)
    square = _in_srgb(square, image.info.get("icc_profile"))
    turned = Image.new(square.mode, square.size)
    turned.paste(square)
    turned.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(turned)


def _as_colours(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Sixteen bits of grey; the conversion itself would cut off what is above the eighth.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    is_transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    wanted = "RGBA" if is_transparent else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The same colours for those who take every picture for sRGB, as ours come without a profile. One that cannot be
    used, or is of other than red, green and blue, is passed over.
    """
    if not profile or len(profile) > MAX_PROFILE_BYTES or profile[RGB_PROFILE] != b"RGB ":
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image.convert("RGB"), given, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None, "only a conversion in place answers nothing"
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


def _encoded(image: Image.Image) -> bytes:
    image.info.clear()  # the encoder would take colour profiles and texts from there
    written = io.BytesIO()
    image.save(written, "WEBP", quality=QUALITY, method=4)
    return written.getvalue()
