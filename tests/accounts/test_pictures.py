"""Turning an uploaded image into square WebP pictures: what is kept, what is rejected, and what it costs."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from core.errors import InvalidInput, TooManyRequests
from services.limits.in_progress import Uploader
from services.pictures import images
from services.pictures.pool import MAX_UPLOADS_PER_ADDRESS, Pictures
from tests.support.pictures import EVIL, SECRET_TEXT, encoded, opened, photo, polyglot, with_metadata, with_texts
from tests.support.service import ROOT

SIDES = (512, 128)
# The chunks that a WebP file without metadata may contain.
PICTURE_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH"}
MORE_MEMORY_MB = 350
MEASURE = """
import pathlib, resource, sys
from core.errors import InvalidInput
from services.pictures import images

content = pathlib.Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    images.squares(content, (512, 128))
except InvalidInput:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def chunks_of(webp: bytes) -> set[bytes]:
    found, at = set(), 12
    while at < len(webp):
        size = int.from_bytes(webp[at + 4 : at + 8], "little")
        found.add(webp[at : at + 4])
        at += 8 + size + size % 2
    return found


def rejection(content: bytes) -> dict[str, object]:
    with pytest.raises(InvalidInput) as caught:
        images.squares(content, SIDES)
    detail = caught.value.detail
    assert isinstance(detail, list)
    assert len(detail) == 1
    return detail[0]


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, ...]) -> bool:
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return all(abs(got - wanted) < 12 for got, wanted in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("width", "height", "sides"),
    [(640, 480, (480, 128)), (700, 1500, (512, 128)), (1200, 600, (512, 128)), (100, 90, (90, 90)), (1, 1, (1, 1))],
)
def test_the_middle_is_cropped_to_squares_and_never_enlarged(
    kind: str, width: int, height: int, sides: tuple[int, int]
) -> None:
    image = Image.new("RGB", (width, height), "white")
    edge = min(width, height)
    image.paste("green", ((width - edge) // 2, (height - edge) // 2, (width + edge) // 2, (height + edge) // 2))
    made = [opened(each) for each in images.squares(encoded(image, kind), SIDES)]
    assert [each.size for each in made] == [(side, side) for side in sides]
    assert {each.format for each in made} == {"WEBP"}
    for each in made:
        last = each.width - 1
        for corner in ((0, 0), (last, 0), (0, last), (last, last)):
            if edge > 4:
                pixel = each.convert("RGB").getpixel(corner)
                assert isinstance(pixel, tuple)
                assert pixel[0] < 90, "the white sides are cropped"


def test_the_orientation_of_a_photo_is_applied() -> None:
    for content in images.squares(with_metadata(), SIDES):
        image = opened(content)
        middle = image.width // 2
        assert near(image, (middle, 5), (254, 0, 0))
        assert near(image, (middle, image.height - 6), (0, 0, 254))


@pytest.mark.parametrize("make", [with_metadata, with_texts, polyglot])
def test_metadata_and_appended_data_are_removed(make: object) -> None:
    assert callable(make)
    content = make()
    assert SECRET_TEXT in content or b"<script>" in content
    for each in images.squares(content, SIDES):
        assert chunks_of(each) <= PICTURE_CHUNKS
        assert SECRET_TEXT not in each
        assert b"<script>" not in each


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "wanted"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG", (254, 0, 0)),
        ("L", 100, "PNG", (100, 100, 100)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("I;16", 100 * 256, "PNG", (100, 100, 100)),
        ("LA", (100, 128), "PNG", (100, 100, 100, 128)),
        ("RGBA", (200, 30, 40, 128), "WEBP", (200, 30, 40, 128)),
    ],
)
def test_every_colour_mode_is_kept(mode: str, colour: object, kind: str, wanted: tuple[int, ...]) -> None:
    content = encoded(Image.new(mode, (600, 600), colour), kind)  # type: ignore[arg-type]
    for each in images.squares(content, SIDES):
        assert near(opened(each), (60, 60), wanted)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_colour_profiles_are_applied(mode: str, kind: str) -> None:
    """Convert pictures with a colour profile that swaps red and green."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = plain.replace(b"rXYZ", b"xxxx").replace(b"gXYZ", b"rXYZ").replace(b"xxxx", b"gXYZ")
    red = Image.new(mode, (64, 64), (255, 0, 0, 128)[: len(mode)])
    for profile, wanted in ((plain, (255, 0, 0, 128)), (swapped, (0, 255, 0, 128)), (swapped[:-200], (255, 0, 0, 128))):
        [made] = images.squares(encoded(red, kind, icc_profile=profile), (64,))
        picture = opened(made)
        assert near(picture, (32, 32), wanted[: len(picture.mode)]), (profile[:4], picture.getpixel((32, 32)))
        assert picture.mode == mode
        assert b"ICCP" not in chunks_of(made)


def test_a_truncated_picture_is_rejected() -> None:
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(noise, kind)
        assert images.squares(whole, SIDES)
        for missing in (1, 12, 30, len(whole) // 2):
            assert rejection(whole[:-missing])["type"] == "invalid_picture", (kind, missing)


def test_a_palette_with_transparency_is_kept() -> None:
    image = Image.new("RGB", (600, 600), "red").quantize()
    for each in images.squares(encoded(image, "PNG", transparency=0), SIDES):
        assert near(opened(each), (60, 60), (0, 0, 0, 0)) or near(opened(each), (60, 60), (255, 0, 0, 0))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "MPO"])
def test_of_several_frames_the_first_is_kept(kind: str) -> None:
    frames = [Image.new("RGB", (600, 600), colour) for colour in ("red", "blue")]
    for each in images.squares(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), SIDES):
        image = opened(each)
        assert getattr(image, "n_frames", 1) == 1
        assert near(image, (60, 60), (254, 0, 0))


@pytest.mark.parametrize("name", EVIL)
def test_files_that_are_no_picture_are_rejected_quickly(name: str) -> None:
    content = EVIL[name]()
    started = time.monotonic()
    problem = rejection(content)
    assert problem["loc"] == ["body", "avatar"]
    assert str(problem["msg"]).startswith("Expected ")
    assert time.monotonic() - started < 5


def test_the_error_names_the_allowed_and_the_actual_size() -> None:
    message = rejection(EVIL["10,000 pixels"]())["msg"]
    assert message == "Expected at most 8,000 pixels per side and 12,500,000 in total, got 10,000 × 10,000"


def test_scans_are_bounded_together_with_pixels() -> None:
    whole = photo(1000, 1000, progressive=True)
    scans = images.scans_of(whole)
    last = whole.rindex(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 91 + whole[-2:]
    assert images.scans_of(many) == scans + 90 < images.MAX_JPEG_SCANS
    assert images.squares(many, SIDES), "a small picture may have many scans"
    # The header exaggerates the size. Only a check that decodes nothing can reject the picture so fast.
    header = many.index(b"\xff\xc2")
    large = many[: header + 5] + struct.pack(">HH", 5_000, 5_000) + many[header + 9 :]
    started = time.monotonic()
    problem = rejection(large)
    assert problem["type"] == "picture_too_complex"
    assert problem["msg"] == f"Expected at most 300,000,000 scans × pixels, got {scans + 90} × 25,000,000"
    assert time.monotonic() - started < 0.5


def test_scans_of_thumbnails_and_of_further_images_are_not_counted() -> None:
    thumbnail = photo(64, 64, progressive=True)
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    plain = photo(64, 64)
    assert images.scans_of(plain) == 1
    assert images.scans_of(plain[:2] + comment + plain[2:] + thumbnail) == 1
    # The decoder skips an unknown marker that has no length, and then decodes the scan after it.
    assert images.scans_of(plain[:-2] + b"\xff\x02\xff\xff" + plain[plain.index(b"\xff\xda") :]) == 2


def test_frames_are_bounded() -> None:
    frames = [Image.new("RGB", (1, 1), (each % 256, each // 256, 0)) for each in range(images.MAX_FRAMES + 1)]
    several = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    problem = rejection(several)
    assert problem["type"] == "picture_too_complex"
    assert problem["msg"] == "Expected a picture with at most 1,000 frames"


async def test_pictures_wait_in_bounded_numbers_per_user_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(images, "squares", lambda content, sides: goes_on.wait(10) and [])
    pictures = Pictures(limits_clients=True)
    at = "2001:db8:0:1::"

    def converting(user_id: int, address: str) -> asyncio.Task[list[bytes]]:
        return asyncio.create_task(pictures.squares(b"", SIDES, Uploader(user_id, address)))

    async def refusal(user_id: int, address: str) -> str:
        with pytest.raises(TooManyRequests) as caught:
            await converting(user_id, address)
        assert caught.value.headers["Retry-After"] == "2"
        return str(caught.value.detail)

    try:
        tasks = [converting(1, f"{at}1"), converting(1, f"{at}2")]
        await asyncio.sleep(0)
        assert (await refusal(1, "192.0.2.1")).startswith("Expected at most 2 queued pictures per user")
        tasks += [converting(2, f"{at}3"), converting(3, f"{at}4")]
        await asyncio.sleep(0)
        assert f"at most 4 queued pictures from {at}/64" in await refusal(4, f"{at}5")
        tasks += [converting(user_id, f"192.0.2.{user_id}") for user_id in range(5, 9)]
        await asyncio.sleep(0)
        assert "at most 8 queued pictures" in await refusal(9, "192.0.2.9")
        goes_on.set()
        await asyncio.gather(*tasks)
        assert await converting(1, f"{at}1") == []
    finally:
        goes_on.set()
        pictures.close()


def test_uploads_are_bounded_per_network() -> None:
    pictures = Pictures(limits_clients=True)
    with ExitStack() as stack:
        for user_id in range(MAX_UPLOADS_PER_ADDRESS):
            stack.enter_context(pictures.receiving(Uploader(user_id, "127.0.0.2")))
        with pytest.raises(TooManyRequests), pictures.receiving(Uploader(99, "127.0.0.2")):
            pass
        with pictures.receiving(Uploader(99, "127.0.0.3")):
            pass
    pictures.close()


def test_unsupported_formats_are_not_decoded() -> None:
    assert images.FORMATS == ("JPEG", "PNG", "WEBP")
    assert opened(photo(kind="GIF")).format == "GIF", "Pillow can read GIF"
    assert rejection(photo(kind="GIF"))["type"] == "invalid_picture"


@pytest.mark.parametrize("name", ["the largest WebP", "the largest JPEG", "10,000 pixels"])
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    """Measure the memory of a separate process. The largest WebP needs the most memory: four copies of its pixels."""
    largest = {
        "the largest WebP": lambda: encoded(Image.new("RGBA", (3535, 3535), (1, 2, 3, 100)), "WEBP", method=0),
        "the largest JPEG": lambda: encoded(Image.new("RGB", (6250, 4000), (1, 2, 3)), "JPEG", progressive=True),
    }
    path = tmp_path / "picture"
    path.write_bytes((largest | dict(EVIL))[name]())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < MORE_MEMORY_MB
