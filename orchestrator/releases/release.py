"""A release, frozen: the process as it was written, the scripts that it runs, and its packages' versions.

The document is canonical JSON that names its files by their SHA-256; the order key signs a small statement about the
document's own SHA-256, so that neither can be changed and a large process needs no large envelope.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from orchestrator.files.script_files import ScriptPathError, read_script
from orchestrator.plan.plan import FrozenFile, PlannedPackage
from relay.errors import RefusedError, SignatureError
from relay.support.durable import sync_folder, write_durably
from relay.trust.envelopes import sign_document, verify_document
from relay.trust.keys import OrderKey, PublicKey

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

RELEASE_TYPE: Final = "application/vnd.waystation.release+json"
"""Of the signed statement."""
SNAPSHOT_FILES: Final = 64
"""Files that may stand in one folder with a server script: all of them are frozen with it."""
SNAPSHOT_BYTES: Final = 4 << 20
"""Bytes of all of them together."""

_Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class FileChangedError(RefusedError):
    """A script is not, or not any more, the one that was planned."""


# --- scripts and what stands beside them


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A plain file of a script's folder."""

    name: str
    data: bytes = field(repr=False)
    executable: bool


def read_beside(file: FrozenFile, leave_out: Collection[str] = ()) -> list[SnapshotFile]:
    """The script, and every plain file that stands beside it, which it may read: what its folder holds, not deeper.

    Hidden files, links and everything else are left out, and so is what `leave_out` names (paths of secrets).

    Raises:
        FileChangedError: the script is not there, or has another SHA-256 than `file` says.
        RefusedError: the folder holds more than `SNAPSHOT_FILES` or `SNAPSHOT_BYTES`, or cannot be read.
    """
    folder, script = os.path.split(os.path.join(file.folder, file.path))
    alone = _read_alone(file)
    hidden_away = {os.path.realpath(each) for each in leave_out}
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_file(follow_symlinks=False)
            and not entry.name.startswith(".")
            and entry.name != script
            and os.path.realpath(entry.path) not in hidden_away
        )
        if len(names) >= SNAPSHOT_FILES:
            raise _too_much(file, folder, f"{len(names) + 1} files, more than {SNAPSHOT_FILES}")
        beside = _read_all(folder, names, SNAPSHOT_BYTES - len(alone.data), file)
    except OSError as error:
        raise RefusedError(f"cannot read the scripts in {folder}: {error.strerror}") from error
    return [alone, *beside]


def check_script(file: FrozenFile, data: bytes) -> None:
    """Raises `FileChangedError` where `data` is not the script that was planned."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise _changed(file, f"has the SHA-256 {digest[:16]}…, planned was {file.sha256[:16]}…")


def write_snapshot(folder: str, files: Iterable[SnapshotFile]) -> None:
    """Write `files` into `folder`, which is there, readable by this user alone. Durable on return. Raises `OSError`."""
    for each in files:
        write_durably(os.path.join(folder, each.name), each.data, mode=0o700 if each.executable else 0o600)
    sync_folder(folder)


def _read_alone(file: FrozenFile) -> SnapshotFile:
    """The script itself. Raises `FileChangedError`."""
    path = os.path.join(file.folder, file.path)
    try:
        data = read_script(file.folder, file.path)
        executable = bool(os.stat(path).st_mode & stat.S_IXUSR)
    except ScriptPathError as error:
        raise _changed(file, f"is not what it was: {error}") from error
    except OSError as error:
        raise _changed(file, f"is not what it was: {error.strerror}") from error
    check_script(file, data)
    return SnapshotFile(os.path.basename(path), data, executable)


def _read_all(folder: str, names: Sequence[str], left: int, file: FrozenFile) -> list[SnapshotFile]:
    found = []
    for name in names:
        # No link that took the file's place since it was listed, and no FIFO that would hold us for ever.
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            executable = bool(os.fstat(descriptor).st_mode & stat.S_IXUSR)
            data = opened.read(left + 1)
        left -= len(data)
        if left < 0:
            raise _too_much(file, folder, f"more than {SNAPSHOT_BYTES >> 20} MiB")
        found.append(SnapshotFile(name, data, executable))
    return found


def _changed(file: FrozenFile, what: str) -> FileChangedError:
    return FileChangedError(
        f"the script {os.path.join(file.folder, file.path)} {what}",
        hint="Plan and deploy again to use it as it is now, or put back what it was",
    )


def _too_much(file: FrozenFile, folder: str, what: str) -> RefusedError:
    return RefusedError(
        f"{folder} holds {what}; all that stands beside a script is frozen with it",
        hint=f"Give {file.path} a folder of its own",
    )


# --- releases


class ReleaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file of the process. `path` is relative to the process's folder, with `/`."""

    path: str
    sha256: _Hex
    executable: bool = False


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What may be deployed under `label`, in any environment.

    Attributes:
        process: the text of the process's file.
        process_name: what that file was called, for messages.
        packages: by their names in the process.
        scripts: the package of the process's own scripts for machines, where there are any.
        files: scripts of the process; those of the server with all that stands beside them.
    """

    format: Literal[1]
    project: str
    label: str
    process: str
    process_name: str
    packages: dict[str, PlannedPackage]
    scripts: PlannedPackage | None = None
    files: tuple[ReleaseFile, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenRelease:
    """What the journal keeps: the document, the envelope that vouches for it, and the files by their SHA-256."""

    document: bytes
    envelope: bytes
    files: Mapping[str, bytes] = field(repr=False)


class _Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the order key signs."""

    format: Literal[1]
    project: str
    label: str
    document: _Hex


def freeze_release(
    process_text: str,
    process_path: str,
    *,
    project: str,
    label: str,
    packages: Mapping[str, PlannedPackage],
    scripts: PlannedPackage | None,
    server_files: Iterable[FrozenFile],
    machine_files: Iterable[FrozenFile] = (),
    signer: Signer,
    leave_out: Collection[str] = (),
) -> FrozenRelease:
    """Freeze the process in `process_path`. The same input gives the same document.

    Args:
        process_text: what stands in the process's file.
        process_path: where it lies; its folder is what `server_files` are relative to.
        project: the process's own name for what it releases.
        label: of the release.
        packages: filled by `orchestrator.releases.packages.ensure_packages`.
        scripts: made by `orchestrator.releases.packages.build_scripts_package`.
        server_files: scripts of the process that run on the server (not those of an environment), frozen with what
            stands beside them.
        machine_files: its scripts that run on machines, frozen alone, as machines get them.
        signer: the order key.
        leave_out: files that must not be frozen though they stand beside a script: secrets.

    Raises:
        FileChangedError: a script is not the one that was planned.
        RefusedError: a script lies outside of the process's folder, or its folder is too large.
        UsageError: no Ed25519 signer.
    """
    home = os.path.dirname(os.path.abspath(process_path))
    found: dict[str, SnapshotFile] = {}
    for file in server_files:
        prefix = _folder_of(file, home)
        found |= {prefix + each.name: each for each in read_beside(file, leave_out)}
    for file in machine_files:
        found.setdefault(_folder_of(file, home) + os.path.basename(file.path), _read_alone(file))
    contents = {path: hashlib.sha256(each.data).hexdigest() for path, each in found.items()}
    release = Release(
        format=1,
        project=project,
        label=label,
        process=process_text,
        process_name=os.path.basename(process_path),
        packages=dict(packages),
        scripts=scripts,
        files=tuple(ReleaseFile(path, contents[path], found[path].executable) for path in sorted(found)),
    )
    document = msgspec.json.encode(release, order="sorted")
    statement = _Statement(1, project, label, hashlib.sha256(document).hexdigest())
    envelope = sign_document(msgspec.json.encode(statement, order="sorted"), RELEASE_TYPE, signer)
    return FrozenRelease(document, envelope, {contents[path]: each.data for path, each in found.items()})


def open_release(document: bytes, envelope: bytes, keys: Sequence[PublicKey]) -> Release:
    """The release in `document`, as one of `keys` signed it.

    Raises:
        SignatureError: altered, not signed by any of them, or signed for another project, label or document.
    """
    payload, _ = verify_document(envelope, keys, RELEASE_TYPE)
    try:
        statement = msgspec.json.decode(payload, type=_Statement)
        if statement.document != hashlib.sha256(document).hexdigest():
            raise SignatureError(f"the release {statement.label!r} is not the one that was signed")
        release = msgspec.json.decode(document, type=Release)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise SignatureError(f"the signed document is no release: {error}") from error
    if (release.project, release.label) != (statement.project, statement.label):
        raise SignatureError(f"the release {release.label!r} is signed as {statement.label!r}")
    paths = [release.process_name, *(file.path for file in release.files)]
    if not all(map(_is_plain, paths)) or "/" in release.process_name:
        raise SignatureError(f"the release {release.label!r} names files outside of its own folder")
    return release


def author_of(envelope: bytes, keys: Sequence[OrderKey]) -> str:
    """The name of the one of `keys` that signed a release; empty where that key has none. Raises as `open_release`."""
    _, keyid = verify_document(envelope, keys, RELEASE_TYPE)
    return next(key.name for key in keys if key.keyid == keyid)


def unpack_release(release: Release, files: Mapping[str, bytes], folder: str) -> str:
    """Write the process and its scripts into the new folder `folder`; the path of the process's file.

    Raises:
        SignatureError: one of `files` (by SHA-256) is missing or holds other bytes.
        RefusedError: `folder` is there already, or cannot be written.
    """
    parts = [SnapshotFile(file.path, _content(files, file, release), file.executable) for file in release.files]
    process = os.path.join(folder, release.process_name)
    try:
        os.makedirs(folder, mode=0o700)
        for part in parts:
            parent = os.path.dirname(os.path.join(folder, part.name))
            os.makedirs(parent, mode=0o700, exist_ok=True)
        write_snapshot(folder, parts)
        # Last: where it stands, all that it names stands too.
        write_durably(process, release.process.encode(), mode=0o600)
    except OSError as error:
        raise RefusedError(f"cannot unpack the release {release.label!r} in {folder}: {error.strerror}") from error
    return process


def _content(files: Mapping[str, bytes], file: ReleaseFile, release: Release) -> bytes:
    data = files.get(file.sha256)
    if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
        raise SignatureError(f"{file.path} of the release {release.label!r} is lost or altered")
    return data


def _folder_of(file: FrozenFile, home: str) -> str:
    """The script's folder relative to the process's, with a slash at its end; empty where it is the same."""
    folder = os.path.relpath(os.path.dirname(os.path.join(file.folder, file.path)), home).replace(os.sep, "/")
    if folder == ".":
        return ""
    if not _is_plain(folder):
        raise RefusedError(f"the script {os.path.join(file.folder, file.path)} lies outside of {home}")
    return f"{folder}/"


def _is_plain(path: str) -> bool:
    """Whether it is relative and stays below where it starts."""
    parts = path.split("/")
    return "\0" not in path and "\\" not in path and all(part not in {"", ".", ".."} for part in parts)
