"""Conversion of an uploaded image into square WebP pictures. The conversion blocks, so call it in a thread.

Rules:
- The format is detected from the bytes; the client's file name and media type are ignored.
- Dimensions are read from the header and checked before any pixel is decoded.
- Pictures are re-encoded from pixels, so nothing else in the file survives: no location, comment or script, and no
  second format hidden behind the first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

# This import registers the formats with `Image.open`, which would otherwise load all plugins of Pillow.
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from core.errors import FieldProblem, InvalidInput

FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
MEDIA_TYPE = "image/webp"
MAX_JPEG_PIXELS = 25_000_000  # Enough for a photo from a good camera. JPEG is decoded at a fraction of its size.
MAX_PIXELS = 12_500_000  # PNG and WebP are decoded whole, at four bytes per pixel. WebP is decoded more than once.
MAX_SIDE = 8_000
MAX_JPEG_SCANS = 200  # A photo has 1 scan, a progressive JPEG about 10. Thousands of scans take minutes to decode.
MAX_SCANNED_PIXELS = 300_000_000  # Each pixel of a scan takes about 2 ns. The largest photo may have twelve scans.
MAX_FRAMES = 1_000  # Only the first frame is decoded, but all frames are counted.
QUALITY = 85
MAX_PROFILE_BYTES = 1024 * 1024  # Colour profiles of cameras and screens have a few hundred bytes.
RGB_PROFILE = slice(16, 20)  # The field "data colour space" of a colour profile (ICC.1:2022, section 7.2.6).
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# This marker never occurs inside scan data, where a byte 0xff is always followed by 00 or is part of a restart marker.
START_OF_SCAN = b"\xff\xda"
END_OF_JPEG = b"\xff\xd9"
FIRST_SEGMENT = b"\xff\xc0"  # this marker and all higher markers are followed by the length of their segment
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd8\xff]")

# Pillow's own check is disabled: `_require_acceptable` checks sizes before decoding; its message states the limits.
Image.MAX_IMAGE_PIXELS = None


def squares(content: bytes, sides: Sequence[int]) -> list[bytes]:
    """Return the central square of the picture as WebP, once for each of `sides` (in pixels, the largest first).

    A smaller picture is not enlarged. Only the first frame of an animation is used. Raises InvalidInput unless
    `content` is a JPEG, PNG or WebP picture within the limits.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _require_acceptable(image, content)
            square = _square(image, sides[0])
    except InvalidInput:
        raise
    except Exception as error:
        # Decoders raise all kinds of exceptions for malformed input.
        raise refused("Expected a complete JPEG, PNG or WebP picture", "invalid_picture") from error
    made = []
    for side in sides:
        square = square if square.width <= side else square.resize((side, side), Image.Resampling.LANCZOS)
        made.append(_encoded(square))
    return made


def refused(message: str, kind: str) -> InvalidInput:
    return InvalidInput([FieldProblem(("body", "avatar"), message, kind)])


def _require_acceptable(image: Image.Image, content: bytes) -> None:
    width, height = image.size
    most = MAX_JPEG_PIXELS if isinstance(image, JpegImagePlugin.JpegImageFile) else MAX_PIXELS
    if width > MAX_SIDE or height > MAX_SIDE or width * height > most:
        message = f"Expected at most {MAX_SIDE:,} pixels per side and {most:,} in total, got {width:,} × {height:,}"
        raise refused(message, "picture_too_large")
    if getattr(image, "n_frames", 1) > MAX_FRAMES:
        raise refused(f"Expected a picture with at most {MAX_FRAMES:,} frames", "picture_too_complex")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        _require_few_scans(content, width * height)
    # The decoder accepts a PNG whose last bytes are missing.
    if isinstance(image, PngImagePlugin.PngImageFile) and PNG_END not in content:
        raise refused("Expected a complete picture, but its end is missing", "invalid_picture")


def _require_few_scans(content: bytes, pixels: int) -> None:
    """Raise InvalidInput if a JPEG has so many scans that decoding would take too long."""
    if content.count(START_OF_SCAN) > MAX_JPEG_SCANS:
        raise refused(f"Expected a JPEG picture with at most {MAX_JPEG_SCANS} scans", "picture_too_complex")
    scans = scans_of(content)
    if scans * pixels > MAX_SCANNED_PIXELS:
        message = f"Expected at most {MAX_SCANNED_PIXELS:,} scans × pixels, got {scans:,} × {pixels:,}"
        raise refused(message, "picture_too_complex")


def scans_of(content: bytes) -> int:
    """Return the number of scans of a JPEG's first image, not counting thumbnails in the metadata."""
    scans, at = 0, 0
    while (found := JPEG_MARKER.search(content, at)) is not None:
        marker, at = found[0], found.end()
        if marker == END_OF_JPEG:
            break
        scans += marker == START_OF_SCAN
        if marker >= FIRST_SEGMENT:
            at += int.from_bytes(content[at : at + 2])
    return scans


def _square(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of the picture, upright, at most `side` pixels wide, as RGB or RGBA."""
    # A JPEG can be decoded at an eighth, a quarter or half of its size. Decoding at twice the target size keeps the
    # picture sharp.
    image.draft(image.mode, (side * 2, side * 2))
    orientation = image.getexif().get(0x0112, 1)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge)
    image.load()
    # Crop first: converting makes a copy, which is then no larger than the square.
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
        # Scale 16 bits of grey to 8 bits, because the conversion itself would clip the values.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    is_transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    wanted = "RGBA" if is_transparent else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB, which viewers assume for pictures without a colour profile. Ignore an unusable profile."""
    if not profile or len(profile) > MAX_PROFILE_BYTES or profile[RGB_PROFILE] != b"RGB ":
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image.convert("RGB"), given, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None, "only an in-place conversion returns None"
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


def _encoded(image: Image.Image) -> bytes:
    image.info.clear()  # otherwise, the encoder would copy colour profiles and metadata from `info`
    written = io.BytesIO()
    image.save(written, "WEBP", quality=QUALITY, method=4)
    return written.getvalue()
