"""Uploaded pictures, and files that only pretend to be pictures."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from PIL import Image, PngImagePlugin

SECRET_TEXT = b"at home, 48.2 north"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def photo(
    width: int = 640, height: int = 480, kind: str = "JPEG", colour: Any = (200, 30, 40), **options: Any
) -> bytes:
    return encoded(Image.new("RGB", (width, height), colour), kind, **options)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def with_metadata() -> bytes:
    """Return a JPEG with a location in its metadata. Its EXIF data rotates it so that red is above blue."""
    image = Image.new("RGB", (600, 300), "blue")
    image.paste("red", (0, 0, 300, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate clockwise
    exif[0x010E] = SECRET_TEXT.decode()
    options = {"exif": exif, "comment": SECRET_TEXT, "icc_profile": SECRET_TEXT, "xmp": SECRET_TEXT}
    return encoded(image, "JPEG", quality=95, **options)


def with_texts() -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", SECRET_TEXT.decode())
    return photo(kind="PNG", pnginfo=texts, icc_profile=SECRET_TEXT)


def polyglot() -> bytes:
    """Return a picture that a browser might take for an HTML page."""
    return photo(comment=b"<script>alert(1)</script>") + b"<html><script>alert(1)</script></html>"


@cache
def png_of_size(width: int, height: int, rows: int = 0) -> bytes:
    """Return a PNG whose header claims this size. It has `rows` rows of zeros, compressed a thousand to one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(width + 1)) for _ in range(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@cache
def text_bomb() -> bytes:
    """Return a PNG whose comment unpacks to far more data than the picture."""
    whole = photo(kind="PNG")
    packed = b"Comment\0\0" + zlib.compress(bytes(8_000_000), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    return whole[:33] + chunk + whole[33:]


def many_scans(scans: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan `scans` times."""
    whole = photo(64, 64, progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'

# Files that must be rejected, by description.
EVIL: Mapping[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"I am a picture, trust me",
    "a page": lambda: b"<!doctype html><script>alert(1)</script>",
    "SVG with a script": lambda: SVG,
    "GIF": lambda: photo(kind="GIF"),
    "BMP": lambda: photo(kind="BMP"),
    "TIFF": lambda: photo(kind="TIFF"),
    "PDF": lambda: b"%PDF-1.7\n" + bytes(200),
    "the first bytes of a PNG": lambda: b"\x89PNG\r\n\x1a\n",
    "the first bytes of a PNG before a page": lambda: b"\x89PNG\r\n\x1a\n<script>alert(1)</script>",
    "the first bytes of a JPEG before a script": lambda: b"\xff\xd8\xff\xe0<?php system($_GET[0]); ?>",
    "a RIFF file with sound": lambda: b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(64),
    "half a JPEG": lambda: photo(3000, 2000)[:20_000],
    "half a PNG": lambda: with_texts()[:-300],
    "half a WebP": lambda: photo(kind="WEBP")[:-100],
    "a PNG with no pixels": lambda: png_of_size(0, 0),
    "10,000 pixels": lambda: png_of_size(10_000, 10_000, 10_000),
    "a long line": lambda: png_of_size(8_001, 1, 1),
    "a header that claims the largest size": lambda: png_of_size(2**31 - 1, 2**31 - 1),
    "a comment that unpacks to 8 MB": text_bomb,
    "a JPEG with a thousand scans": lambda: many_scans(1_000),
    "a PNG just above the size limit": lambda: png_of_size(4_000, 3_126, 3_126),
}
