"""Identifies a run by its options, its data and the files it starts from, and finds its folder; no Keras."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import config
from config import TrainConfig
from data_helper import PreparedSplit, open_split, prepared_splits
from files import UserError, no_such_file, sha256, write_json
from model_files import hub
from reading import run_files
from reading.run_files import CONFIG, RESULT

_FILE_OPTIONS = ("weights", "teacher", "without")


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """Everything that decides what a run computes.

    Attributes:
        options: every option of train.py but `config.PLACES`, in nested sections, JSON-ready.
        digests: SHA-256, 64 hexadecimal digits, of the ``train`` split, of the split that selects the epoch (``val`` or
            ``test``) and of the files behind ``weights``, ``teacher`` and ``without``. One that is not known is absent:
            run folders of old versions have none, and a grid can be listed where its data is not prepared.
    """

    options: Mapping[str, Any]
    digests: Mapping[str, str]

    @property
    def name(self) -> str:
        """The default name of the run's folder, ``<dataset>-<arch>-seed<seed>-<8 hex>``.

        The digits depend on the digests and on the options that differ from their defaults, so that a new option
        leaves the names of all other runs as they are.
        """
        default = _leaves(options_of(TrainConfig()))
        # 1 and 1.0 are one value, however the settings were made.
        changed = {
            name: float(value) if type(value) is int else value
            for name, value in _leaves(self.options).items()
            if name not in default or value != default[name]
        }
        text = json.dumps([changed, dict(self.digests)], sort_keys=True)
        return self.prefix + hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def prefix(self) -> str:
        """`name` without its digits."""
        arch = self.options["model"]["arch"].replace(":", "_")
        return f"{self.options['dataset']}-{arch}-seed{self.options['seed']}-"

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the options, and ``digests``."""
        return {**self.options, "digests": dict(self.digests)}

    def changes(self, other: RunIdentity) -> list[str]:
        """The differences between two runs, as ``epochs: 4 -> 2``; empty for the same run.

        A digest that one of the two does not know makes no difference.
        """
        found = config.differences(self.options, other.options)
        for name in sorted(set(self.digests) & set(other.digests)):
            left, right = self.digests[name], other.digests[name]
            if left != right:
                what = f"file of --{name}" if name in _FILE_OPTIONS else f"data of the {name} split"
                found.append(f"{what}: SHA-256 {left[:8]}... -> {right[:8]}...")
        return found


def options_of(settings: TrainConfig) -> dict[str, Any]:
    """The options that decide what a run computes, in nested sections, JSON-ready."""
    return {name: value for name, value in config.to_dict(settings).items() if name not in config.PLACES}


def identity_of(settings: TrainConfig, splits: Mapping[str, PreparedSplit]) -> RunIdentity:
    """The identity of the run that ``settings`` describe on these splits.

    Raises:
        UserError: the file of ``--weights``, ``--teacher`` or ``--without`` does not exist.
    """
    digests = {name: splits[name].digest for name in ("train", settings.select_on)}
    for name in _FILE_OPTIONS:
        if path := getattr(settings, name):
            path = hub.local_file(path)
            if not Path(path).is_file():
                kind = "list of test.py suspects" if name == "without" else "model file"
                raise no_such_file(path, kind, f"--{name} {path}")
            digests[name] = sha256(path)
    return RunIdentity(options_of(settings), digests)


def planned_identity(settings: TrainConfig) -> RunIdentity:
    """As `identity_of`, with the digests of the splits and files that are there; needs none of them."""
    digests = {}
    name = settings.dataset.value
    prepared = {split for dataset, split in prepared_splits(settings.data_dir) if dataset == name}
    for split in {"train", settings.select_on} & prepared:
        with contextlib.suppress(UserError):  # damaged: the training reports it
            digests[split] = open_split(settings.data_dir, name, split).digest
    for option in _FILE_OPTIONS:
        path = getattr(settings, option)
        with contextlib.suppress(UserError):  # cannot be fetched: the training reports it
            if path and Path(path := hub.local_file(path)).is_file():
                digests[option] = sha256(path)
    return RunIdentity(options_of(settings), digests)


def read_identity(folder: str | Path) -> RunIdentity | None:
    """The identity of the run in a folder, options that its version did not have at their defaults; None without a run.

    It is stored in `config.json`. Where only the result was kept, it is taken from `result.json`.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / CONFIG
    if path.exists():
        stored = run_files.read_options(path)
    elif (path := Path(folder) / RESULT).exists():
        result = run_files.read_result(path)
        if result.get("config") is None:  # of an evaluation, not of a run
            return None
        stored = {**result["config"], "digests": result.get("digests")}
    else:
        return None
    default = options_of(TrainConfig())
    digests = stored.pop("digests", None) or {}
    absent = {name for name in default if isinstance(default[name], dict) and stored.get(name) is None}
    options = {name: value for name, value in stored.items() if name not in absent.union(config.PLACES)}
    return RunIdentity(_filled(default, options), digests)


def stored_runs(
    root: str | Path, pattern: str = "*", damaged: dict[Path, str] | None = None
) -> dict[Path, RunIdentity]:
    """The runs in the folders directly below ``root``; damaged ones and other folders are left out.

    Args:
        root: folder of run folders; may not exist.
        pattern: of the folders' names.
        damaged: gets the message of each damaged run, by its folder.
    """
    found = {}
    for folder in sorted(Path(root).glob(pattern)):
        try:
            if identity := read_identity(folder):
                found[folder] = identity
        except (UserError, OSError) as error:
            if damaged is not None:
                damaged[folder] = str(error)
    return found


def default_folder(identity: RunIdentity, root: str | Path) -> Path:
    """The folder of a run below ``root``: one that holds it already, or else a new one with the run's name.

    Versions before the digests gave other digits, so every folder named like the run counts.
    """
    return find_run(identity, stored_runs(root, f"{identity.prefix}*")) or Path(root) / identity.name


def find_run(identity: RunIdentity, runs: Mapping[Path, RunIdentity]) -> Path | None:
    """The folder among ``runs`` (`stored_runs`) that holds a run; a finished one before others; None without one."""
    same = [folder for folder, stored in runs.items() if not stored.changes(identity)]
    return min(
        same, key=lambda folder: (not (folder / RESULT).exists(), folder.name != identity.name, folder), default=None
    )


def claim_folder(folder: str | Path, identity: RunIdentity, evaluated: PreparedSplit) -> dict[str, Any] | None:
    """Makes a folder that of a run, or finds the same run there.

    The files of an old version, without digests, get those of today.

    Args:
        folder: the run's.
        identity: of the run.
        evaluated: the split that the run ends with measuring.

    Returns:
        The result of the run if it is finished; None if there is something left to do.

    Raises:
        UserError: the folder holds another run.
    """
    folder = Path(folder)
    stored = read_identity(folder)
    if stored and (changed := stored.changes(identity)):
        raise UserError(
            f"{folder} holds another run ({'; '.join(changed)}); repeat its own command on its own data to "
            "continue it, or choose another --run-dir"
        )
    if not (folder / CONFIG).exists() or run_files.read_options(folder / CONFIG) != identity.to_dict():
        write_json(folder / CONFIG, identity.to_dict())
    if not (folder / RESULT).exists():
        return None
    result = _read_result(folder / RESULT)
    complete = {**result, "config": dict(identity.options), "digests": result_digests(identity, evaluated)}
    measured = (result.get("digests") or {}).get(evaluated.meta["split"], evaluated.digest)
    if (result["split"], measured) != (evaluated.meta["split"], evaluated.digest):
        print(f"{folder} holds this run, measured on other data than today's {evaluated.name}; measuring again")
        return None
    if complete != result:
        write_json(folder / RESULT, complete)
    return complete


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return run_files.read_result(path, ("split",))
    except UserError as error:
        raise UserError(f"{error}; remove this file, and the same command measures the run again") from None


def result_digests(identity: RunIdentity, evaluated: PreparedSplit) -> dict[str, str]:
    """The ``digests`` of `result.json`: those of the run, and the measured split's."""
    return {**identity.digests, evaluated.meta["split"]: evaluated.digest}


def _filled(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``values``, with the defaults of those that are missing."""
    filled = dict(default)
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(default.get(name), dict)
        filled[name] = _filled(default[name], value) if both else value
    return filled


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
