"""README.md: its commands and Python run in a copy of the project; its links, files and options exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_type_hints

import cv2
import nbformat
import numpy as np
import pytest
import yaml
from conftest import ROOT
from notebooks import notices, run_notebook, shown_images, text_of

README = ROOT / "README.md"

# A command is run with the options of the longest matching beginning added: they make it small. Later options win.
SMALL_NETWORK = "--epochs 1 --num-embeddings 2 --embedding-size 4 --input-size 24 --batch-size 8"
ADDED_OPTIONS = {
    "python train.py": SMALL_NETWORK,
    "python -m pytest": "-n 0 -p no:cacheprovider tests/datasets/test_datasets.py",
    "python prepare_data.py": "",
    "python prepare_data.py rafdb": "--size 16 --val-share 0.34",
    "python prepare_data.py affectnet": "--size 16 --val-share 0.5",
    "python prepare_data.py published": "--size 16",
    "python prepare_data.py folders": "--size 16 --val-share 0.5",
    "python test.py recognize": "",
    "python test.py video": "",
    "python test.py evaluate": "",
    "python test.py describe": "",
    "python test.py convert": "",
    "python test.py calibrate": "",
    "python test.py export": "--max-drop 100",  # the images of the tests are few
    "python reproduce.py run": f"{SMALL_NETWORK} --seeds 1",
    "python reproduce.py list": f"{SMALL_NETWORK} --seeds 1",
    "python reproduce.py report": f"{SMALL_NETWORK} --seeds 1",
}
NOT_RUN = {
    "git clone": "needs a network; .ci/run works in a checkout",
    "cd": "goes with git clone",
    "pip install": "needs a network; .ci/run does it in a fresh environment",
    "jupyter": "waits for a browser; test_tour.py runs the notebook",
    "python demo.py": "serves a page until it is stopped",
    "python test.py video --camera": "needs a camera",
    "python tests/fuzz.py": "takes minutes; test_fuzz.py runs a few hundred cases",
    "python tests/kills.py": "takes minutes; test_kills.py takes a few places",
}
SHOWN_ONLY = {"", "text", "yaml", "bibtex"}  # what follows ``` of a block that is not run


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of README: its language, its text, and the output that the block after it shows."""

    language: str
    text: str
    output: str = ""


def read_blocks(markdown: str) -> list[Block]:
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```", markdown, re.M | re.S))
    blocks = []
    for match, after in zip(found, [*found[1:], None], strict=True):
        follows = after and not after[1] and not markdown[match.end() : after.start()].strip()
        blocks.append(Block(match[1], match[2], after[2] if follows else ""))
    return blocks


def read_commands(block: Block) -> list[tuple[str, ...]]:
    """The commands of a shell block as words, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [tuple(words) for part in parts if (words := shlex.split(part, comments=True))]


def rule_of(words: Sequence[str]) -> str | None:
    """The longest beginning among the rules that the command starts with."""
    rules = [rule for rule in (*ADDED_OPTIONS, *NOT_RUN) if words[: len(rule.split())] == tuple(rule.split())]
    return max(rules, key=len, default=None)


MARKDOWN = README.read_text(encoding="utf-8")
BLOCKS = read_blocks(MARKDOWN)
COMMANDS = [words for block in BLOCKS if block.language == "sh" for words in read_commands(block)]
TO_RUN = [words for words in COMMANDS if rule_of(words) not in NOT_RUN]


def test_every_command_has_a_rule():
    unknown = [shlex.join(words) for words in COMMANDS if rule_of(words) is None]
    assert not unknown, (
        f"README.md has commands that this test does not know: {unknown}; "
        "add to ADDED_OPTIONS the options that make them small, or to NOT_RUN why they are not run"
    )


def test_every_block_is_run_or_only_shown():
    languages = {block.language for block in BLOCKS}
    assert languages <= {"sh", "python"} | SHOWN_ONLY, (
        "write ```sh for commands, or add the language to SHOWN_ONLY or to what is run"
    )
    hidden = [block.text for block in BLOCKS if not block.language and re.match(r"\$|python |pip ", block.text)]
    assert not hidden, "a block with commands begins with ```sh"
    assert TO_RUN and any(block.language == "python" for block in BLOCKS)


# Commands


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the files that git knows, with tiny releases, short presets and few synthetic faces."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    build_releases(folder / "releases")
    build_clip(folder / "clip.mp4")
    for preset in (folder / "grids" / "presets").iterdir():
        grid = yaml.safe_load(preset.read_text())
        preset.write_text(yaml.safe_dump({**grid, "rows": grid["rows"][:2]}))
    few = "python prepare_data.py synthetic --num-train 28 --num-val 14 --num-test 14 --size 24"
    run_together(shlex.split(few), folder)
    return folder


def build_releases(folder: Path) -> None:
    """A release ``folder/NAME`` for ``prepare_data.py NAME``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "datasets")
        fer2013, rafdb, ferplus, affectnet = map(
            importlib.import_module, ("test_fer2013", "test_rafdb", "test_ferplus", "affectnet_releases")
        )
    expressions = {name: count for name, count in affectnet.CODES.items() if count < 7}
    four = dict.fromkeys(expressions, 4)
    affectnet.write_folder(folder / "affectnet", affectnet.release_2021(four, four))
    mine = {f"train/{name}/{n}.jpg": affectnet.jpeg(name, "train") for name in expressions for n in range(2)}
    affectnet.write_folder(folder / "folders", mine)
    affectnet.write_folder(folder / "published", affectnet.annotated(four, "train"))
    affectnet.write_folder(folder / "fer2013", {"fer2013.csv": fer2013.table().encode()})
    affectnet.write_folder(folder / "ferplus", {name: text.encode() for name, text in ferplus.RELEASE.items()})
    rafdb.write_release(folder / "rafdb")


def build_clip(path: Path) -> None:
    """A clip of half a second that pans over the example photograph."""
    photograph = cv2.imread(str(ROOT / "examples" / "astronaut.png"))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (320, 240))
    for left in range(20, 70, 10):
        writer.write(np.ascontiguousarray(photograph[:240, left : left + 320]))
    writer.release()


# What they write, later commands read.
WRITERS = ("python prepare_data.py", "python test.py convert", "python test.py export", "python reproduce.py run")
DONE: set[tuple[str, ...]] = set()  # by this process


@pytest.mark.slow
@pytest.mark.parametrize("words", TO_RUN, ids=shlex.join)
def test_command(project, words):
    """After the earlier commands that write something, which another process of pytest may have run in its own copy."""
    for earlier in TO_RUN[: TO_RUN.index(words)]:
        if earlier not in DONE and shlex.join(earlier).startswith(WRITERS):
            run_together(with_values(earlier), project)
            DONE.add(earlier)
    output = run_together(with_values(words), project)
    DONE.add(words)
    if shown := next((block.output for block in BLOCKS if block.output and read_commands(block) == [words]), ""):
        found, wanted = (re.split(r"(\d+(?:\.\d+)?)", " ".join(text.split())) for text in (output, shown))
        assert found[::2] == wanted[::2], f"README shows another output than the command's:\n{output}"
        np.testing.assert_allclose(np.array(found[1::2], float), np.array(wanted[1::2], float), atol=2)


def with_values(words: Sequence[str]) -> list[str]:
    """The command with files for its placeholders, and the options that make it small."""
    values = {"PATH": f"releases/{words[2]}" if len(words) > 2 else "", "CLIP": "clip.mp4"}
    # A published file takes long to make and to read: model_files/test_published_file.py does that.
    published = [word for word in words if re.fullmatch(r"\w+_\d{4}\.h5", word)]
    values |= dict.fromkeys(published, "trained_models/fer2013_mini_xcp.weights.h5")
    added = shlex.split(ADDED_OPTIONS[rule_of(words)]) + ["--devices", "2"] * ("--devices" in words)
    return [values.get(word, word) for word in words] + added


def run_together(words: Sequence[str], folder: Path) -> str:
    """Runs a command, with ``--processes N`` as N processes that connect at a free port; the first one's output."""
    if "--processes" not in words:
        return finish(start(words, folder), words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    count = int(words[words.index("--processes") + 1])
    commands = [[*words, "--process-id", str(rank), "--coordinator", address] for rank in range(count)]
    started = [start(command, folder) for command in commands]
    try:
        outputs = [finish(process, command) for process, command in zip(started, commands, strict=True)]
    finally:
        for process in started:
            process.kill()
    return outputs[0]


def start(words: Sequence[str], folder: Path) -> subprocess.Popen:
    assert words[0] == "python", f"{shlex.join(words)}: expected a command of Python"
    outer = ("PYTEST_", "PYTHONPATH", "KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return subprocess.Popen(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, words: Sequence[str]) -> str:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, f"{shlex.join(words)}: exit code {process.returncode}\n{output}{errors}"
    return output


# Python


@pytest.mark.slow
def test_python_blocks_run_in_jupyter(project):
    """In one kernel that is started in the project's folder; a paragraph of a block is a cell."""
    blocks = [block.text for block in BLOCKS if block.language == "python"]
    source = [part.strip() for text in blocks for part in re.split(r"\n\n(?=\S)", text)]
    few_epochs = (
        "import config, dataclasses\n"
        "config.RECIPES['default'] = dataclasses.replace(config.RECIPES['default'], epochs=1)"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in (few_epochs, *source)]
    if not (project / "data" / "fer2013").exists():  # the commands did not run before
        run_together(with_values(("python", "prepare_data.py", "fer2013", "--source", "PATH")), project)
    done = run_notebook(nbformat.v4.new_notebook(cells=cells), project, path=None)
    texts = [text_of(cell) for cell in done.cells if "recognize_fer(" in cell.source]
    assert texts and all(text.startswith("Happy") for text in texts)
    assert any(shown_images(cell) for cell in done.cells)
    assert not set(notices(done)) - {"no GPU found: running on the CPU"}


# Links, files and options


def slugs(markdown: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M)
    texts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts}


def test_links_lead_to_files_and_headings():
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", MARKDOWN)
    assert links
    for target, anchor in links:
        path = ROOT / target if target else README
        assert path.exists(), target
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def in_backticks() -> Iterator[str]:
    for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", MARKDOWN, flags=re.M | re.S)):
        yield from span.split()


def test_files_and_names_in_backticks_exist():
    tops = {path.name for path in ROOT.iterdir()} - {"runs", "data", "reports"}  # those hold what commands write
    for word in in_backticks():
        first = word.split("/")[0]
        if word.endswith(".py") or ("/" in word and first in tops):
            assert list(ROOT.glob(word)), word
        elif match := re.fullmatch(r"(\w+)\.([A-Z]\w+)", word):
            tree = ast.parse((ROOT / f"{match[1]}.py").read_text(encoding="utf-8"))
            defined = {getattr(node, "name", None) for node in tree.body}
            defined |= {getattr(n, "id", None) for node in tree.body for n in getattr(node, "targets", [])}
            defined |= {getattr(getattr(node, "target", None), "id", None) for node in tree.body}
            assert match[2] in defined, word


def test_options_in_backticks_exist():
    """The blocks' options are tested by running them."""
    named = {word.split("=")[0].split("|")[0] for word in in_backticks() if word.startswith("--")}
    assert named and named <= all_options() | {"--help"}, named - all_options()


def all_options() -> set[str]:
    """The options of every command, from the config classes that the commands' modules hold."""
    import datasets
    import prepare_data
    import reproduce
    import test
    import train

    classes = [datasets.get(name).options for name in datasets.NAMES] + [importlib.import_module("config").TrainOptions]
    for module in (prepare_data, reproduce, test, train):
        classes += [each for each in vars(module).values() if isinstance(each, type) and dataclasses.is_dataclass(each)]
    return {name for each in classes for name in options_of(each)}


def options_of(config: type) -> Iterator[str]:
    for name, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint)
        option = name.replace("_", "-")
        yield from (f"--{option}", f"--no-{option}")
