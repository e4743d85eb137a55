"""Which options and data make a run, how its folder is named and found, and run folders of an old version."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_split

import config
import run_identity
from config import LossConfig, ModelConfig, TrainConfig
from data_helper import open_split
from files import UserError
from run_identity import RunIdentity, options_of

OLD_RUNS = Path(__file__).parent / "data" / "run_without_digests"
OLD_RUN = "synthetic-mini_xcp-seed0-69522c95"
DATA = {"train": "a" * 64, "val": "b" * 64}


def identity(settings: TrainConfig = TrainConfig(), **digests: str) -> RunIdentity:  # noqa: B008 - frozen
    return RunIdentity(options_of(settings), {**DATA, **digests})


@pytest.fixture
def prepared(tmp_path) -> TrainConfig:
    for split, labels in (("train", [0, 1, 2]), ("val", [3]), ("test", [4, 5])):
        write_split(tmp_path / "data", labels, split=split)
    return TrainConfig(data_dir=str(tmp_path / "data"))


def opened(settings: TrainConfig) -> dict:
    return {split: open_split(settings.data_dir, "synthetic", split) for split in ("train", "val", "test")}


# --- identity and name


def test_a_run_is_its_options_its_data_and_the_files_it_starts_from(prepared, tmp_path):
    for name in ("start.h5", "teacher.h5", "list.csv"):
        (tmp_path / name).write_text(name)
    files = {"weights": "start.h5", "teacher": "teacher.h5", "without": "list.csv"}
    settings = dataclasses.replace(prepared, **{option: str(tmp_path / name) for option, name in files.items()})
    found = run_identity.identity_of(settings, opened(prepared))
    assert found.digests.keys() == {"train", "val", *files}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found.digests.values())
    assert run_identity.planned_identity(settings) == found
    # Each of the inputs alone makes another run, and its name says so.
    (tmp_path / "start.h5").write_text("another file")
    weights = run_identity.identity_of(settings, opened(prepared))
    write_split(prepared.data_dir, [0, 1, 1])
    data = run_identity.identity_of(settings, opened(prepared))
    assert [change.split(":")[0] for change in found.changes(weights)] == ["file of --weights"]
    assert [change.split(":")[0] for change in weights.changes(data)] == ["data of the train split"]
    assert len({found.name, weights.name, data.name}) == 3
    for option in files:
        with pytest.raises(UserError, match=rf"--{option} nowhere\.h5"):
            run_identity.identity_of(dataclasses.replace(prepared, **{option: "nowhere.h5"}), opened(prepared))


def test_a_plan_needs_neither_data_nor_files(tmp_path):
    settings = TrainConfig(data_dir=str(tmp_path), weights="nowhere.h5")
    assert run_identity.planned_identity(settings) == RunIdentity(options_of(settings), {})


def test_a_name_tells_data_set_network_and_seed():
    settings = TrainConfig(seed=5, model=ModelConfig(arch="keras:MobileNetV2"))
    assert re.fullmatch("synthetic-keras_MobileNetV2-seed5-[0-9a-f]{8}", identity(settings).name)
    assert identity(dataclasses.replace(settings, epochs=4)).name != identity(settings).name


def test_a_new_option_changes_no_name_and_no_run():
    run = identity(TrainConfig(epochs=3))
    options = {**run.options, "loss": {**run.options["loss"]}}
    del options["loss"]["ramp_epochs"], options["teacher"]
    older = RunIdentity(options, DATA)
    assert older.name == run.name


def test_places_and_kinds_of_number_change_no_name():
    elsewhere = {"run_dir": "x", "data_dir": "y", "debug": True, "devices": 2, "processes": 3, "coordinator": "a:1"}
    assert identity(TrainConfig(**elsewhere)) == identity()
    assert identity(TrainConfig(loss=LossConfig(w_fd=0))).name == identity(TrainConfig(loss=LossConfig(w_fd=0.0))).name


def test_a_digest_that_one_side_lacks_makes_no_difference():
    assert RunIdentity(options_of(TrainConfig()), {}).changes(identity()) == []
    assert identity().changes(identity(weights="c" * 64)) == []


# --- folders


def store(folder: Path, run: RunIdentity, finished: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run.to_dict()))
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


def test_a_run_is_found_under_any_digits_and_a_finished_one_first(tmp_path):
    run, other_data = identity(), identity(train="d" * 64)
    assert run_identity.default_folder(run, tmp_path) == tmp_path / run.name
    store(tmp_path / f"{run.prefix}00000000", other_data, finished=True)
    (tmp_path / f"{run.prefix}00000001").mkdir()
    (tmp_path / f"{run.prefix}00000001" / "config.json").write_text("[")
    assert run_identity.default_folder(run, tmp_path) == tmp_path / run.name
    unfinished = store(tmp_path / f"{run.prefix}00000002", run)
    assert run_identity.default_folder(run, tmp_path) == unfinished
    store(tmp_path / run.name, run)
    assert run_identity.default_folder(run, tmp_path) == tmp_path / run.name
    finished = store(tmp_path / f"{run.prefix}00000003", RunIdentity(run.options, {}), finished=True)
    assert run_identity.default_folder(run, tmp_path) == finished
    assert run_identity.default_folder(other_data, tmp_path).name == f"{run.prefix}00000000"


def test_a_kept_result_says_which_run_it_is(tmp_path):
    result = {"config": options_of(TrainConfig(epochs=3)), "digests": {**DATA, "test": "e" * 64}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    found = run_identity.read_identity(tmp_path)
    assert found.changes(identity(TrainConfig(epochs=3))) == []
    assert found.changes(identity(TrainConfig(epochs=4), train="f" * 64)) == [
        "epochs: 3 -> 4",
        "data of the train split: SHA-256 aaaaaaaa... -> ffffffff...",
    ]
    (tmp_path / "result.json").write_text('{"accuracy": 0.5}')  # of test.py
    assert run_identity.read_identity(tmp_path) is None


def test_a_folder_of_another_run_is_refused_with_what_changed(tmp_path, prepared):
    test = open_split(prepared.data_dir, "synthetic", "test")
    folder = tmp_path / "run"
    assert run_identity.claim_folder(folder, identity(), test) is None
    before = (folder / "config.json").read_bytes()
    assert run_identity.claim_folder(folder, identity(), test) is None, "a stopped run continues"
    other = identity(TrainConfig(epochs=3), val="c" * 64)
    with pytest.raises(UserError, match=r"run holds another run \(epochs: 12 -> 3; data of the val split"):
        run_identity.claim_folder(folder, other, test)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", '{"accuracy": 0.5}', '{"split": "test", "digests": 5}'])
def test_a_damaged_result_is_named(tmp_path, prepared, text):
    test = open_split(prepared.data_dir, "synthetic", "test")
    store(tmp_path / "run", identity())
    (tmp_path / "run" / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"run/result\.json"):
        run_identity.claim_folder(tmp_path / "run", identity(), test)


# --- an old version's run, without digests and without some of today's options


@pytest.fixture
def old_run(tmp_path) -> Path:
    folder = shutil.copytree(OLD_RUNS / OLD_RUN, tmp_path / "runs" / OLD_RUN)
    options = json.loads((folder / "config.json").read_text())
    del options["loss"]["ramp_epochs"]
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def test_an_old_run_is_found_accepted_once_and_completed(old_run, prepared, tmp_path):
    run = run_identity.identity_of(prepared, opened(prepared))
    assert run_identity.default_folder(run, tmp_path / "runs") == old_run
    old = json.loads((OLD_RUNS / OLD_RUN / "result.json").read_text())
    result = run_identity.claim_folder(old_run, run, opened(prepared)["test"])
    del old["config"]  # gets the options that are new
    assert {name: result[name] for name in old} == old, "every measure stays, to the bit"
    assert result["digests"].keys() == {"train", "val", "test"}
    assert json.loads((old_run / "result.json").read_text()) == result
    assert json.loads((old_run / "config.json").read_text()) == run.to_dict()
    # From now on it is the run of these data.
    write_split(prepared.data_dir, [3, 3], split="val")
    other = run_identity.identity_of(prepared, opened(prepared))
    assert run_identity.default_folder(other, tmp_path / "runs") == tmp_path / "runs" / other.name
    with pytest.raises(UserError, match="data of the val split"):
        run_identity.claim_folder(old_run, other, opened(prepared)["test"])


def test_a_result_of_other_test_data_is_not_returned(old_run, prepared, capsys):
    """Training does not depend on them: it is the same run, with something left to do."""
    run = run_identity.identity_of(prepared, opened(prepared))
    assert run_identity.claim_folder(old_run, run, opened(prepared)["test"])
    np.save(write_split(prepared.data_dir, [4, 5], split="test") / "labels.npy", np.array([5, 4]))
    meta = Path(prepared.data_dir) / "synthetic" / "test" / "meta.json"
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "digest"}))
    assert run_identity.identity_of(prepared, opened(prepared)) == run
    assert run_identity.claim_folder(old_run, run, opened(prepared)["test"]) is None
    assert "synthetic/test" in capsys.readouterr().out


def test_the_old_identity_had_every_option_that_it_was_made_with():
    stored = run_identity.read_identity(OLD_RUNS / OLD_RUN)
    assert stored.digests == {} and stored.changes(identity()) == []
    assert config.differences(stored.options, options_of(TrainConfig(epochs=13))) == ["epochs: 12 -> 13"]
