"""Results of recognition: their text, their table, their images; and that they keep no photograph in memory."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from files import UserError
from images import read_image
from recognition.results import ImageResult, Recognition, Results, kept

CLASSES = ("Neutral", "Happy", "Sad")
BLUE = (0, 114, 178)  # what boxes are drawn with


def face(label="Happy", share=0.9, box=(102, 80, 123, 123), score: float | None = 0.99) -> Recognition:
    rest = (1 - share) / (len(CLASSES) - 1)
    probabilities = {name: share if name == label else rest for name in CLASSES}
    return Recognition(label, probabilities, np.ones((2, 3), np.float32), np.zeros((9, 9, 3), np.uint8), box, score)


@pytest.fixture
def photograph(tmp_path):
    """A plain image of 400 x 300 pixels."""
    path = tmp_path / "photograph.png"
    Image.new("RGB", (400, 300), (90, 90, 90)).save(path)
    return path


@pytest.fixture
def results(photograph):
    several = [face(), face("Sad", 0.6, (10, 20, 30, 30), 3.5)]
    return Results(
        [
            ImageResult(str(photograph), (400, 300), several, source=photograph),
            ImageResult("wall.png", (400, 300), [], source=photograph),
            ImageResult("bad.png", (0, 0), [], error="bad.png: the file is empty"),
        ],
        CLASSES,
    )


# Text


def test_text_is_one_short_line_per_image(results, photograph):
    assert repr(results[0].best) == "Happy 90% at (102, 80), 123 x 123"
    assert repr(results).splitlines() == [
        f"{photograph}: 2 faces: Happy 90%, Sad 60%",
        "wall.png: no face found",
        "bad.png: cannot be read (the file is empty)",
    ]
    assert repr(ImageResult("a.png", (9, 9), [face()])) == "a.png: Happy 90% at (102, 80), 123 x 123"
    many = Results([results[1]] * 100, CLASSES)
    assert len(repr(many).splitlines()) < 40 and "70" in repr(many).splitlines()[-1]


def test_best_face_and_label(results):
    assert (results[0].best, results[0].label) == (results[0].faces[0], "Happy")
    for nothing in results[1:]:
        assert (nothing.best, nothing.label) == (None, None)


def test_results_are_compared_hashed_copied_and_pickled(results):
    """Arrays inside would make the comparison of fields raise."""
    one, other = face(), face()
    assert one == one and one != other and len({one, other, one}) == 2 and other not in [one]
    assert results[0] != results[1] and len(set(results)) == 3
    for same in (copy.deepcopy(results), pickle.loads(pickle.dumps(results)), results[:]):
        assert repr(same) == repr(results) and same.class_names == CLASSES


# Table


def test_table_has_one_row_per_face_and_blanks_where_there_is_none(results, photograph):
    table = results.to_dataframe()
    columns = ["image", "face", "x", "y", "width", "height", "score", "label", *CLASSES, "error"]
    assert list(table.columns) == columns
    assert table.image.tolist() == [str(photograph)] * 2 + ["wall.png", "bad.png"]
    first = [1, 102, 80, 123, 123, 0.99, "Happy"]
    assert table.iloc[0][columns[1:8]].tolist() == first and table.iloc[0]["Happy"] == 0.9
    assert table.face.tolist()[:2] == [1, 2] and table.width.dtype == "Int64"
    blank = [name for name in columns if name not in ("image", "error")]
    assert table.iloc[2:][blank].isna().all(axis=None)
    assert table.error.isna().tolist() == [True] * 3 + [False]
    assert list(Results([], CLASSES).to_dataframe().columns) == columns


# Images


def is_drawn(image: np.ndarray, x: int, y: int) -> bool:
    return np.abs(image[y, x].astype(int) - BLUE).max() < 40


def test_boxes_are_drawn_around_the_faces_at_full_size(results, tmp_path):
    target = tmp_path / "new" / "out.jpg"
    results[0].save(target)
    drawn = read_image(target)
    assert drawn.shape == (300, 400, 3)
    for x, y, width, height in ((102, 80, 123, 123), (10, 20, 30, 30)):
        assert is_drawn(drawn, x + 1, y + height // 2) and is_drawn(drawn, x + width - 2, y + height // 2)
        assert not is_drawn(drawn, x + width // 2, y + height // 2)
        assert is_drawn(drawn, x + 2, max(0, y - 3))  # the label above
    assert tuple(drawn[280, 350]) == (90, 90, 90)


@pytest.mark.parametrize("box", [(-30, -20, 100, 100), (350, 250, 100, 100), (0, 0, 400, 300), (5, 5, 1, 1)])
def test_box_over_the_border_is_drawn_inside(photograph, box):
    drawn = ImageResult("a.png", (400, 300), [face(box=box)], source=photograph).annotated()
    inside = np.abs(drawn.astype(int) - BLUE).max(axis=2) == 0
    assert drawn.shape == (300, 400, 3) and inside.sum() > 100


def test_small_face_crop_is_enlarged_until_its_label_is_readable(tmp_path):
    Image.new("L", (48, 48), 90).save(tmp_path / "crop.png")
    result = ImageResult("crop.png", (48, 48), [face(box=(0, 0, 48, 48))], source=tmp_path / "crop.png")
    assert result.annotated().shape == (240, 240, 3)


def test_notebook_shows_faces_images_and_a_sheet(results):
    for shown in (results[0].best, results[0], results[1], results, Results([results[1]] * 30, CLASSES)):
        picture = Image.open(io.BytesIO(shown._repr_png_()))
        assert picture.format == "PNG" and max(picture.size) <= 2000
    assert results[2]._repr_png_() is None and Results()._repr_png_() is None


def test_folder_gets_a_copy_of_each_readable_image(results, tmp_path):
    twice = Results([*results, results[0]], CLASSES)
    written = twice.save(tmp_path / "out")
    assert [path.name for path in written] == ["photograph.jpg", "wall.jpg", "photograph-2.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)


def test_image_itself_is_never_overwritten(results, photograph):
    before = photograph.read_bytes()
    with pytest.raises(UserError, match=r"photograph\.png: .*itself"):
        results[0].save(photograph)
    assert photograph.read_bytes() == before


def test_what_cannot_be_drawn_is_refused(results, photograph, tmp_path):
    with pytest.raises(UserError, match=r"out\.txt: .*\.jpg"):
        results[0].save(tmp_path / "out.txt")
    with pytest.raises(UserError, match=r"bad\.png"):
        results[2].save(tmp_path / "out.png")
    Image.new("RGB", (40, 30)).save(photograph)
    with pytest.raises(UserError, match=r"400 x 300 .* 40 x 30"):
        results[0].save(tmp_path / "out.png")
    assert not list(tmp_path.glob("out*"))


# What is kept


@pytest.mark.parametrize(
    ("shape", "side"), [((100, 100, 3), 100), ((900, 900, 3), 128), ((300, 400, 3), 48), ((1, 1, 3), 1)]
)
def test_face_is_kept_small_and_is_never_a_view(shape, side):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = kept(pixels, 48)
    assert found.shape == (side, side, 3) and found.dtype == np.uint8 and not np.shares_memory(found, pixels)
    assert kept(np.zeros((900, 900, 3), np.uint8), 224).shape == (224, 224, 3)
