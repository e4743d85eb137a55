"""The table of groups is read as it is written, and every fault is one message with its line."""

from __future__ import annotations

import pytest

from files import UserError
from reading.group_table import MOST_GROUPS, read_groups


def write(tmp_path, text):
    path = tmp_path / "groups.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(tmp_path, text, num_images=10):
    return read_groups(write(tmp_path, text), num_images, "toy/val")


def test_rows_groups_and_nothing_else(tmp_path):
    text = '\ufeffage, group ,image\r\n31,old,2\r\n\r\n7, "young, but"  ,0\r\n80,old,9\r\n'
    text = text.replace(' "young, but"  ', '"young, but"')
    assert read(tmp_path, text) == {2: "old", 0: "young, but", 9: "old"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,group\n0,a\n10,b\n", r"groups.csv, line 3: .*toy/val, 0 to 9, found '10'"),
        ("image,group\n0,a\n-1,b\n", r"line 3: .*found '-1'"),
        ("image,group\n0,a\n1.0,b\n", r"line 3: .*found '1.0'"),
        ("image,group\n0,a\n,b\n", r"line 3: .*found ''"),
        ("image,group\n0,a\n\u0663,b\n", r"line 3: .*row number"),
        (f"image,group\n0,a\n{'9' * 5000},b\n", r"line 3: .*row number"),
        ("image,group\n4,a\n\n5,b\n4,b\n", r"line 5: .*image 4 is on line 2 too"),
        ("image,group\n0,a\n1,\n", r"line 3: .*name of a group.*found ''"),
        (f"image,group\n0,a\n1,{'b' * 41}\n", r"line 3: .*1 to 40 printable"),
        ("image,group\n0,a\n1,b\x1b[31m\n", r"line 3: .*printable"),
        ("image,group\n0,a\n1,b,c\n", r"line 3: expected 2 columns, found 3"),
        ("image,group\n0,a\n1\n", r"line 3: expected 2 columns, found 1"),
        ('image,group\n0,a\n1,"b\n', r"after line 2: .*CSV"),
        ("row,group\n0,a\n", r"line 1: .*found no columns 'image'"),
        ("image,group,group\n0,a,b\n", r"line 1: .*found 2 columns 'group'"),
        ("", r"line 1: .*found no columns 'image'"),
        ("image,group\n", r"expected 2 to 50 groups to compare, found 0 \(none\)"),
        ("image,group\n0,a\n1,a\n", r"found 1 \('a'\)"),
        (b"image,group\n0,\xff\n", r"not UTF-8"),
    ],
)
def test_a_fault_is_one_message_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1_000


def test_too_many_groups_and_no_file(tmp_path):
    rows = "".join(f"{i},group {i}\n" for i in range(MOST_GROUPS + 1))
    with pytest.raises(UserError, match=r"found 51 \('group 0', 'group 1', 'group 2', \.\.\.\)"):
        read(tmp_path, f"image,group\n{rows}", 100)
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        read_groups(tmp_path / "none.csv", 10, "toy/val")
