"""What counts as an image: every form of the same pixels, and what is refused with which remedy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from files import UserError
from recognition.inputs import copy_of, open_inputs

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GRAY = PIXELS[..., 0]


def png(pixels=PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def read(images, **options) -> list[np.ndarray]:
    return [item.read(**options) for item in open_inputs(images).images]


def names(images) -> list[str]:
    return [item.name for item in open_inputs(images).images]


def test_every_form_of_an_image_gives_the_same_pixels(folder):
    path = folder / "a.png"
    opaque = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    for form in (
        path,
        str(path),
        png(),
        bytearray(png()),
        memoryview(png()),
        io.BytesIO(png()),
        PIXELS,
        opaque,
        Image.fromarray(PIXELS),
        Image.open(path),
    ):
        inputs = open_inputs(form)
        assert (inputs.is_single, inputs.count) == (True, 1)
        (found,) = [item.read() for item in inputs.images]
        assert found.dtype == np.uint8 and np.array_equal(found, PIXELS), type(form)


def test_gray_arrays_and_images_get_three_equal_channels():
    for form in (GRAY, GRAY[..., None], Image.fromarray(GRAY)):
        (found,) = read(form)
        assert np.array_equal(found, np.repeat(GRAY[..., None], 3, axis=2))


def test_bgr_concerns_arrays_only(folder):
    for form in (PIXELS[..., ::-1], folder / "a.png", png(), Image.fromarray(PIXELS)):
        assert np.array_equal(read(form, bgr=True)[0], PIXELS)


def test_pil_images_are_turned_upright_and_drawn_over_mid_gray():
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert (read(Image.fromarray(clear))[0] == 128).all()
    deep = Image.fromarray(GRAY.astype(np.uint16) * 257)
    assert np.array_equal(read(deep)[0][..., 0], GRAY)
    file, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(PIXELS).save(file, "PNG", exif=tags)
    assert np.array_equal(read(Image.open(file))[0], np.rot90(PIXELS, -1))


def test_lists_iterators_and_stacks_keep_their_order_and_have_names(folder):
    forms = [PIXELS, str(folder / "a.png"), Image.fromarray(PIXELS)]
    assert names(forms) == names(iter(forms)) == ["images[0]", str(folder / "a.png"), "images[2]"]
    assert open_inputs(iter(forms)).count is None
    assert len(read(np.stack([PIXELS] * 5))) == len(read(np.stack([GRAY] * 5))) == 5


def test_folder_and_pattern_give_their_images_sorted(folder):
    assert names(folder) == names(f"{folder}/*.[pP][nN][gG]") == [f"{folder}/a.png", f"{folder}/b.PNG"]
    assert names(f"{folder}/**/*.png") == [f"{folder}/a.png", f"{folder}/sub/c.png"]
    assert not open_inputs(folder).is_single


def test_existing_file_is_never_taken_for_a_pattern(folder):
    path = folder / "a[1].png"
    path.write_bytes(png())
    assert names(str(path)) == [str(path)]


class Tensor:
    """What other libraries have beside arrays."""

    def __init__(self, values, problem=""):
        self.values, self.shape, self.problem = values, values.shape, problem

    def __iter__(self):
        return iter(self.values)

    def __array__(self, dtype=None, copy=None):
        if self.problem:
            raise TypeError(self.problem)
        return self.values


@pytest.mark.parametrize(
    ("image", "facts"),
    [
        (PIXELS / 255, r"float64 \(6, 8, 3\).*255 \* image"),
        (PIXELS.astype(np.float32), r"float32 .* image\.round\(\)"),
        (np.full((6, 8, 3), np.nan), r"float64 .*round"),
        (PIXELS.astype(np.uint16), "uint16 .* // 257"),
        (PIXELS.astype(np.int64), r"int64 .*image\.astype\('uint8'\)"),
        (PIXELS > 9, "bool "),
        (PIXELS.transpose(2, 0, 1), r"\(3, 6, 8\).*transpose\(1, 2, 0\)"),
        (Tensor(PIXELS.transpose(2, 0, 1)), r"\(3, 6, 8\).*transpose\(1, 2, 0\)"),
        (Tensor(PIXELS, "on a GPU"), r"image: .*received Tensor \(on a GPU\)"),
        (PIXELS[:0], r"\(0, 8, 3\)"),
        (PIXELS[..., :2], r"\(6, 8, 2\)"),
        (Image.fromarray(GRAY.astype(np.float32)), "float32"),
        (None, "None .*cv2.imread"),
        (3, "received int"),
        ({"a": 1}, "received dict"),
        ([], "received none"),
        ([PIXELS, None], r"images\[1\]: .* None"),
        ([[PIXELS]], r"images\[0\]: .* list"),
        (b"no image", "cannot be decoded"),
        ("", "empty"),
        ("x" * 5000, "cannot be read"),
        ("https://example.org/a.jpg", "download"),
        ("clip.MP4", r"test\.py video clip\.MP4"),
        ("nowhere/*.png", r"nowhere/\*\.png: no file"),
        ("nowhere.png", r"nowhere\.png: no such file"),
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(image, facts):
    with pytest.raises(UserError, match=rf"(?s){facts}"):
        read(image)


def test_folder_without_images_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: the folder has no image"):
        read(folder / "empty")


def test_bad_path_in_a_list_leaves_the_others_readable(folder):
    wrong = ["nowhere/*.png", folder / "nowhere", "https://example.org/a.jpg", "x" * 5000]
    *bad, good = open_inputs([*wrong, folder / "a.png"]).images
    for item in bad:
        with pytest.raises(UserError):
            item.read()
    assert np.array_equal(good.read(), PIXELS)


def test_source_is_kept_as_its_file_or_a_small_copy(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert copy_of("a.png", PIXELS) == folder / "a.png"
    assert copy_of(png(), PIXELS) == png()
    large = np.full((1000, 1000, 3), 90, np.uint8)
    copy = copy_of(large, large)
    assert isinstance(copy, bytes) and len(copy) < large.nbytes / 50
