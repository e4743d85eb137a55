"""Fetches model files that are named ``hf://owner/repository/file`` from the Hugging Face Hub."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from files import UserError, sha256

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>[^/].*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_REASON = 300


def is_address(path: str | Path | None) -> bool:
    """Whether a model file is named by its place on the Hub."""
    return isinstance(path, str) and path.startswith(PREFIX)


def local_file(path: str | Path) -> str | Path:
    """The file on this machine that a model file's name means; only a name with ``hf://`` is fetched.

    The file is kept in the cache folder of huggingface_hub (``HF_HOME``). Once it is there, it is found without a
    network too. Its content is not trusted: who loads it checks it as any other model file.

    Args:
        path: a path, which is returned as it is, or ``hf://owner/repository/file``, where ``repository@revision``
            names a branch, a tag or a commit. The main branch is the default.

    Raises:
        UserError: an address of another form; huggingface_hub is not installed; no such repository, revision or file;
            no access to it; no network; or content without the digest that the Hub names.
    """
    return _fetched(path) if is_address(path) else path


@functools.cache  # one process uses one version of a file: the one whose digest is the run's
def _fetched(address: str) -> Path:
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(
            f"{address}: expected hf://owner/repository/file or hf://owner/repository@revision/file, "
            "as hf://owner/fer2013/best.weights.h5"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{address}: huggingface_hub is not installed here; run: pip install huggingface_hub")
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(found["repository"], found["file"], revision=found["revision"])
    except (
        Exception
    ) as error:  # of huggingface_hub, of its HTTP library or the disk: they have no common class but this
        raise UserError(f"{address}: {_reason(error, **found.groupdict())}") from None
    _check_digest(Path(path), address)
    return Path(path)


def _reason(error: Exception, repository: str, revision: str | None, file: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # also a server that answers with an error
        cause = error.__cause__ or error
        return f"the Hub cannot be reached, and the file is not in the cache ({_short(cause)})"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository {repository} has no file {file}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository {repository} has no revision {revision}"
    if isinstance(error, errors.GatedRepoError):
        return f"ask for access to {repository} on its page, then run: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {repository}; for a private one run: hf auth login"
    return f"cannot be fetched ({_short(error)})"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def _check_digest(path: Path, address: str) -> None:
    """Compares a file with its SHA-256, by which the Hub's cache names the content of large files."""
    content = path.resolve()
    # Small files are named by Git's own digest, and where there are no symbolic links the name is the file's.
    if not _SHA256.fullmatch(content.name):
        return
    digest = sha256(content)
    if digest != content.name:
        path.unlink()
        content.unlink(missing_ok=True)
        raise UserError(
            f"{address}: expected content with SHA-256 {content.name}, received {digest}; nothing was kept; try again"
        )
