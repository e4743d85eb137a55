"""Parts join to the very file that was cut, or nothing is written."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from files import UserError, write_json
from model_files import parts

CONTENT = np.random.default_rng(0).bytes(25_000)


@pytest.fixture
def folder(tmp_path):
    """A folder with a file's parts of 10,000 bytes and nothing else."""
    path = tmp_path / "whole"
    path.write_bytes(CONTENT)
    found = parts.split(path, tmp_path / "parts", 10_000)
    assert [part.name for part in found] == ["weights.part00", "weights.part01", "weights.part02"]
    return tmp_path / "parts"


@pytest.mark.parametrize("source", ["folder", "manifest"])
def test_joined_parts_are_the_file(folder, tmp_path, source):
    assert [part.stat().st_size for part in sorted(folder.glob("weights.part0*"))] == [10_000, 10_000, 5_000]
    source = folder if source == "folder" else folder / parts.MANIFEST
    assert parts.is_in_parts(source) and not parts.is_in_parts(tmp_path / "whole")
    parts.join(source, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == CONTENT


def test_the_manifest_lists_names_bytes_and_digests(folder):
    manifest = json.loads((folder / parts.MANIFEST).read_text())
    listed = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.glob("weights.part0*"))
    ]
    assert manifest == {"bytes": 25_000, "sha256": hashlib.sha256(CONTENT).hexdigest(), "parts": listed}


def test_parts_with_the_earlier_names_join(folder, tmp_path):
    manifest = json.loads((folder / parts.MANIFEST).read_text())
    for part in manifest["parts"]:
        new = part["name"].replace("weights.", "weights.f16.")
        (folder / part["name"]).rename(folder / new)
        part["name"] = new
    (folder / parts.MANIFEST).unlink()
    write_json(folder / "weights.f16.json", manifest)
    parts.join(folder, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == CONTENT


def test_fewer_parts_leave_none_of_the_old_behind(folder, tmp_path):
    (folder / "notes.txt").write_text("not ours")
    parts.split(tmp_path / "whole", folder, 1_000_000)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "weights.part00", parts.MANIFEST]


def test_a_hundred_parts_keep_their_order(tmp_path):
    (tmp_path / "whole").write_bytes(CONTENT[:130])
    found = parts.split(tmp_path / "whole", tmp_path / "parts", 1)
    assert found == sorted(found) and b"".join(part.read_bytes() for part in sorted(found)) == CONTENT[:130]


def test_the_manifest_comes_last(tmp_path, folder, monkeypatch):
    """A cut that was stopped leaves no manifest, neither the old nor the new one."""

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        parts.split(tmp_path / "whole", folder, 9_000)
    with pytest.raises(UserError, match=r"parts: expected a manifest, or a folder with weights\.parts\.json"):
        parts.join(folder, tmp_path / "joined")


def change(**values):
    def spoil(folder):
        manifest = json.loads((folder / parts.MANIFEST).read_text())
        write_json(folder / parts.MANIFEST, {**manifest, **values})

    return spoil


def one(**values):
    """Another first part in the manifest."""

    def spoil(folder):
        manifest = json.loads((folder / parts.MANIFEST).read_text())
        manifest["parts"][0] |= values
        write_json(folder / parts.MANIFEST, manifest)

    return spoil


def flip(folder):
    path = folder / "weights.part01"
    data = bytearray(path.read_bytes())
    data[5_000] ^= 1
    path.write_bytes(data)


def swap(folder):
    manifest = json.loads((folder / parts.MANIFEST).read_text())
    write_json(folder / parts.MANIFEST, {**manifest, "parts": manifest["parts"][::-1]})


SPOILT = {
    "a part gone": (lambda folder: (folder / "weights.part01").unlink(), "part01: this part is missing"),
    "a part cut off": (
        lambda folder: (folder / "weights.part01").write_bytes(b"x"),
        "part01: expected 10,000 bytes, found 1",
    ),
    "a part too long": (
        lambda folder: (folder / "weights.part01").write_bytes(bytes(20_000)),
        "part01: expected 10,000 bytes, found 20,000",
    ),
    "a flipped bit": (flip, "part01: expected SHA-256"),
    "another order": (swap, "the parts together: expected SHA-256"),
    "no manifest": (lambda folder: (folder / parts.MANIFEST).unlink(), "expected a manifest"),
    "no JSON": (lambda folder: (folder / parts.MANIFEST).write_text("{"), "expected JSON"),
    "numbers": (change(parts=[3]), "expected a manifest of parts"),
    "a list": (lambda folder: write_json(folder / parts.MANIFEST, [1]), "expected a manifest of parts"),
    "text for bytes": (change(bytes="25000"), "expected a manifest of parts"),
    "another sum": (change(bytes=24_999), "expected parts of 24,999 bytes in all"),
    "a negative size": (one(bytes=-1), "expected a manifest of parts"),
    "another folder": (one(name="../whole"), "expected a manifest of parts"),
    "a path": (one(name="/etc/passwd"), "expected a manifest of parts"),
    "the folder": (one(name="."), "expected a manifest of parts"),
    "control codes": (one(name="a\n\x1b"), "expected a manifest of parts"),
    "no digest": (one(sha256="no"), "expected a manifest of parts"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_parts_are_refused(folder, tmp_path, kind):
    spoil, message = SPOILT[kind]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        parts.join(folder, tmp_path / "joined")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "joined").exists() and not list(tmp_path.glob(".tmp-*"))
