"""Tests of images: every kind of image file gives the same plain pixels; resizing."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import run_python
from PIL import Image, ImageOps

import images
from files import UserError
from images import decode_image, read_image, resize_image

RED, GREEN, BLUE, GRAY = (250, 10, 20), (10, 200, 30), (20, 30, 240), (90, 90, 90)


def png(width, height, depth, color_type, rows):
    """A PNG file written out by hand: color_type 0 gray, 2 RGB, 4 gray + alpha, 6 RGBA; big-endian samples."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(image):
    """A JPEG of an RGB image."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def quadrants(top_left, top_right, bottom_left, bottom_right, height=16, width=32):
    image = np.empty((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = top_left, top_right
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = bottom_left, bottom_right
    return image


# --- decode_image ---------------------------------------------------------------------------------------------------


def test_gray_keeps_one_channel_and_its_values():
    image = decode_image(png(3, 2, 8, 0, [bytes([0, 100, 255]), bytes([7, 8, 9])]), "gray.png")
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0], [100], [255]], [[7], [8], [9]]]


def test_colour_is_rgb():
    image = decode_image(png(2, 1, 8, 2, [bytes([1, 2, 3, 250, 0, 9])]), "colour.png")
    assert image.tolist() == [[[1, 2, 3], [250, 0, 9]]]
    assert image.flags.c_contiguous


def test_16_bits_are_scaled_to_8():
    """65535 / 257 = 255, 25600 / 257 = 99.6, 128 / 257 = 0.498."""
    image = decode_image(png(4, 1, 16, 0, [struct.pack(">4H", 65535, 25600, 128, 0)]), "deep.png")
    assert image.dtype == np.uint8
    assert image.ravel().tolist() == [255, 100, 0, 0]


def test_transparency_is_drawn_over_mid_gray():
    """Opaque keeps its colour, clear is 128, and half is (200 * 128 + 128 * 127) / 255 = 164.1."""
    for depth, unit, step in (
        (8, "B", 1),
        (16, "H", 257),
    ):
        values = [200, 100, 0, 255, 200, 100, 0, 0, 200, 200, 0, 128]
        image = decode_image(png(3, 1, depth, 6, [struct.pack(f">12{unit}", *(v * step for v in values))]), "clear.png")
        assert image.tolist() == [[[200, 100, 0], [128, 128, 128], [164, 164, 64]]]


def test_gray_with_transparency():
    image = decode_image(png(2, 1, 8, 4, [bytes([200, 255, 200, 0])]), "clear-gray.png")
    assert image.tolist() == [[[200, 200, 200], [128, 128, 128]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_tag_turns_every_format_upright(kind, orientation):
    stored = Image.fromarray(quadrants(RED, GREEN, BLUE, GRAY))
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, kind, exif=tags, **({"lossless": True} if kind == "WEBP" else {"quality": 95}))
    found = decode_image(file.getvalue(), "turned").astype(int)
    tags_of_file = Image.open(file)
    assert tags_of_file.getexif()[0x0112] == orientation
    expected = np.asarray(ImageOps.exif_transpose(tags_of_file).convert("RGB"))
    assert found.shape == expected.shape
    centers = np.s_[4::8, 4::8]  # away from the edges, where JPEG mixes colours
    assert np.abs(found[centers] - expected[centers]).max() < 12


def test_orientation_turns_transparent_and_gray_images_too():
    for mode in ("RGBA", "L"):
        tags, file = Image.Exif(), io.BytesIO()
        tags[0x0112] = 6
        Image.fromarray(quadrants(RED, GREEN, BLUE, GRAY)).convert(mode).save(file, "PNG", exif=tags)
        image = decode_image(file.getvalue(), "turned.png")
        assert image.shape == (32, 16, 3 if mode == "RGBA" else 1) and image.flags.c_contiguous


def test_damaged_tags_cost_no_image():
    whole = png(2, 1, 8, 0, [b"\1\2"])
    for exif in (b"", b"MM", b"MM\0*\0\0\0\xff", b"\xff" * 40):
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        assert decode_image(whole[:33] + chunk + whole[33:], "x.png").tolist() == [[[1], [2]]]


FORMATS = {
    "baseline": (".jpg", []),
    "progressive": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "restarts": (".jpg", [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    "png": (".png", []),
    "webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),
    "lossless webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("is_gray", [False, True], ids=["colour", "gray"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_off_file_gives_one_message_and_nothing_else(kind, is_gray, share, capfd):
    """Of a JPEG also when an end mark follows the cut: the decoder then fills the rest and returns an image."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # this file has imported cv2 before images
    extension, flags = FORMATS[kind]
    smooth = np.add.outer(np.arange(160), np.arange(120))[..., None] // 2
    noise = np.random.default_rng(0).integers(0, 100, (160, 120, 3))
    pixels = (smooth + noise).astype(np.uint8)
    whole = cv2.imencode(extension, pixels[..., 0] if is_gray else pixels, flags)[1].tobytes()
    assert decode_image(whole, "whole").shape == (160, 120, 3 if extension == ".webp" or not is_gray else 1)
    cut = whole[: int(len(whole) * share)]
    with pytest.raises(UserError, match=r"photos/x: .*(whole|damaged)"):
        decode_image(cut, "photos/x")
    if extension == ".jpg":
        with pytest.raises(UserError, match=r"photos/x: .*(whole|damaged)"):
            decode_image(cut + b"\xff\xd9", "photos/x")
    assert capfd.readouterr().err == ""


def test_a_jpeg_with_surplus_bytes_is_used_and_nothing_is_printed(capfd):
    """Cameras write such files; libjpeg reports "extraneous bytes" and the image is whole."""
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    surplus = whole[:-2] + bytes(range(40, 60)) + whole[-2:]
    assert cv2.imdecode(np.frombuffer(surplus, np.uint8), cv2.IMREAD_ANYCOLOR) is not None
    assert "extraneous bytes" in capfd.readouterr().err  # OpenCV alone prints it
    assert np.array_equal(decode_image(surplus, "x.jpg"), decode_image(whole, "x.jpg"))
    assert capfd.readouterr().err == ""


def test_threads_decode_while_another_output_reaches_the_screen(capfd):
    """Each file gets its own verdict, and no line of a progress bar is lost."""
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    damaged = whole[: len(whole) // 2] + b"\xff\xd9"

    def verdict(number: int) -> bool:
        os.write(2, b"line %d\n" % number)
        try:
            decode_image(damaged if number % 3 == 0 else whole, "x.jpg")
        except UserError:
            return True
        return False

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(verdict, range(120)))
    assert found == [number % 3 == 0 for number in range(120)]
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(f"line {number}" for number in range(120))


def test_a_process_without_stderr_decodes_too(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg(quadrants(RED, GREEN, BLUE, GRAY)))
    code = "import os, sys, images; os.close(2); print(images.read_image(sys.argv[1]).shape)"
    assert run_python("-c", code, tmp_path / "x.jpg").stdout == "(16, 32, 3)\n"


def test_whole_jpeg_with_plain_lower_rows_is_no_damaged_one(capfd):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    image[50:] = 255
    for flags in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]):
        for pixels in (image, image[..., 0]):
            data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
            for more in (b"", b"\0" * 50, data):  # a telephone appends a second image or a video
                assert decode_image(data + more, "plain.jpg").shape[:2] == (90, 70)
    assert capfd.readouterr().err == ""


def test_gray_jpeg_is_gray():
    data = cv2.imencode(".jpg", np.full((8, 8), 77, np.uint8))[1].tobytes()
    assert np.array_equal(decode_image(data, "gray.jpg"), np.full((8, 8, 1), 77))


def test_one_pixel_and_a_very_long_line():
    assert decode_image(png(1, 1, 8, 0, [b"\x05"]), "dot.png").tolist() == [[[5]]]
    line = decode_image(png(30000, 1, 8, 0, [bytes(30000)]), "line.png")
    assert line.shape == (1, 30000, 1)


def test_what_is_no_image_is_named():
    for data, message in (
        (b"", "empty"),
        (b"<!DOCTYPE html><p>not found", r"expected a whole JPEG.*b'<!DOCTYP'"),
        (jpeg(quadrants(RED, GREEN, BLUE, GRAY))[:-300], "cannot be decoded"),
        (png(2, 1, 8, 0, [b"\1\2"])[:-14], "cannot be decoded"),
        (cv2.imencode(".hdr", np.ones((2, 2, 3), np.float32))[1].tobytes(), "cannot be decoded"),
        (cv2.imencode(".tiff", np.ones((2, 2), np.float32))[1].tobytes(), "8 or 16 bits per channel.*float32"),
    ):
        with pytest.raises(UserError, match=rf"(?s)folder/x\.png: .*{message}"):
            decode_image(data, "folder/x.png")


def bmp_header(width, height):
    """What a 24-bit BMP of that size begins with."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def deep_tiff(side):
    """A TIFF of 16-bit RGBA whose only strip is empty."""
    bits_at = 8 + 2 + 8 * 12 + 4
    tags = (
        *((256, 3, 1, side), (257, 3, 1, side), (258, 3, 4, bits_at), (259, 3, 1, 1)),
        *((262, 3, 1, 2), (273, 4, 1, 0), (277, 3, 1, 4), (279, 4, 1, 0)),
    )
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + directory + bytes(4) + struct.pack("<4H", 16, 16, 16, 16)


def test_a_png_that_cannot_hold_its_pixels_is_refused_before_they_take_memory(monkeypatch):
    monkeypatch.setattr(images, "_decode", None)  # is not called
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_image(png(9_000, 9_000, 8, 2, [b""]), "x.png")


@pytest.mark.parametrize("kind", [b"IDAT", b"IEND"])
def test_a_png_chunk_that_claims_more_than_the_file_is_refused_before_it_takes_memory(monkeypatch, kind):
    """OpenCV allocates what a chunk claims, up to 4 GiB."""
    data = bytearray(png(2, 1, 8, 0, [b"\1\2"]))
    assert decode_image(bytes(data) + b"something behind the end", "x.png").shape == (1, 2, 1)
    monkeypatch.setattr(images, "_decode", None)  # is not called
    at = data.index(kind)
    data[at - 4 : at] = struct.pack(">I", 3_308_508_928)
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_image(bytes(data), "x.png")


TOO_LARGE = "the image is too large; expected at most 100,000,000 pixels"


def test_a_refusal_comes_before_the_memory_is_full_and_is_the_only_message(tmp_path):
    """In a process of its own, because OpenCV reads its limit and its log level when it is first imported."""
    wrong = {
        "area": (png(20_000, 20_000, 8, 0, [b""]), TOO_LARGE),
        "bytes": (png(10_000, 10_000, 16, 6, [b""]), "300,000,000 bytes of pixels"),
        "deep.tif": (deep_tiff(9_000), "300,000,000 bytes of pixels"),
        "side": (bmp_header(2_000_000, 1), TOO_LARGE),
        "cut": (png(2, 1, 8, 0, [b"\1\2"])[:-14], "cannot be decoded"),
    }
    for name, (data, _) in wrong.items():
        (tmp_path / name).write_bytes(data)
    code = """
import images, files, sys
for path in sys.argv[1:]:
    try:
        images.read_image(path)
    except files.UserError as error:
        print(error)
"""
    done = run_python("-c", code, *(tmp_path / name for name in wrong))
    lines = done.stdout.splitlines()
    assert len(lines) == len(wrong) and done.stderr == ""
    for line, (name, (_, message)) in zip(lines, wrong.items(), strict=True):
        assert line.startswith(f"{tmp_path}/{name}: ") and message in line


# --- read_image -----------------------------------------------------------------------------------------------------


def test_read_image_repeats_gray(tmp_path):
    path = tmp_path / "gray.png"
    path.write_bytes(png(2, 1, 8, 0, [bytes([3, 4])]))
    assert read_image(path).tolist() == read_image(str(path)).tolist() == [[[3, 3, 3], [4, 4, 4]]]


def test_read_image_refuses_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png: no such file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="expected an image file, found a folder"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="expected an image file, found a device"):
        read_image(tmp_path / "pipe")


def test_read_image_refuses_a_huge_file(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(200_000_001)  # takes no room on the disk
    with pytest.raises(UserError, match=r"huge\.png: expected an image of at most 200,000,000 bytes"):
        read_image(tmp_path / "huge.png")


# --- resize_image ---------------------------------------------------------------------------------------------------


def test_shrinking_averages_over_area():
    """One pixel of 225 in each 3 x 3 block is a mean of 25; linear interpolation would take the middle pixel, 0."""
    image = np.zeros((12, 12, 1), np.uint8)
    image[::3, ::3] = 225
    assert np.array_equal(resize_image(image, 4), np.full((4, 4, 1), 25))


def test_growing_interpolates():
    image = np.array([[0, 200]], np.uint8).reshape(1, 2, 1)
    row = resize_image(image, 4)[0, :, 0].tolist()
    assert row == [0, 50, 150, 200]  # pixel centres at -0.25, 0.25, 0.75 and 1.25 of the old ones


def test_each_axis_is_treated_on_its_own():
    """1000 wide and 2 high: the columns alternate and are averaged, the two rows are interpolated."""
    image = np.zeros((2, 1000, 1), np.uint8)
    image[0, ::2] = 200
    assert resize_image(image, 4)[..., 0].tolist() == [[100] * 4, [75] * 4, [25] * 4, [0] * 4]


def test_resize_shapes():
    for shape in (
        (1, 40000, 3),
        (40000, 1, 1),
        (48, 48, 3),
    ):
        image = np.full(shape, 9, np.uint8)
        assert np.array_equal(resize_image(image, 48), np.full((48, 48, shape[2]), 9))
