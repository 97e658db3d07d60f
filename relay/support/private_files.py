"""Private keys in files: made once, never overwritten, read only where nobody else can.

PKCS #8 in PEM without a password; the file's mode is the protection, as with SSH. Orchestrator and agent share this.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from relay.errors import NotFoundError, RefusedError, StoreError, UsageError
from relay.folders import make_folder
from relay.support.durable import sync_folder, write_durably

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from securesystemslib.signer import CryptoSigner

_KEY_FILE_MAX = 16 << 10
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_folder(folder: str) -> None:
    """Make `folder` with mode 0700; one that is there must be private already.

    Raises:
        RefusedError: not a folder, or others may look into it.
    """
    try:
        make_folder(folder, mode=0o700)
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise RefusedError(f"cannot make the folder {folder}: {error.strerror}") from error
    if mode & _OTHERS:
        raise RefusedError(
            f"the folder {folder} is open to others (mode {stat.S_IMODE(mode):04o})",
            hint=f"run 'chmod 700 {folder}', or name a new folder",
        )


def make_private_file(path: str) -> None:
    """An empty file with mode 0600, and its folder, durable on return; one that is there stays as it is.

    SQLite's other files take the mode of their database.

    Raises:
        StoreError: it cannot be made.
    """
    folder = os.path.dirname(path)
    try:
        make_folder(folder, mode=0o700)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}") from error
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        sync_folder(folder)
    except FileExistsError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}") from error


def write_new_file(path: str, data: bytes, *, mode: int) -> None:
    """Write a file that was not there before, durable on return.

    Raises:
        RefusedError: something has this name already (it is untouched), or the disk said no.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise RefusedError(f"{path} exists already and is never overwritten") from error
    except OSError as error:
        raise RefusedError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(path) or ".")
    except OSError as error:
        os.unlink(path)
        raise RefusedError(f"cannot write {path}: {error.strerror}") from error


def write_private_text(path: str, text: str) -> None:
    """Write a line that its owner alone may read. A file that is there is replaced, and keeps owner, group and mode.

    Raises:
        RefusedError: it cannot be written; what is there is untouched.
    """
    try:
        write_durably(path, f"{text}\n".encode(), mode=0o600, must_keep_owner=True)
    except OSError as error:
        raise RefusedError(f"cannot write {path}: {error.strerror}") from error


def close_to_others(descriptor: int) -> None:
    """Where a shell has just made the file that we write into (`> FILE`), it is for its owner alone.

    A file whose mode is not the one that shells give was made with another thought, and stays as it is.
    """
    if os.name == "nt":
        return
    umask = os.umask(0o077)
    os.umask(umask)
    status = os.fstat(descriptor)
    made_by_shell = stat.S_IMODE(status.st_mode) == 0o666 & ~umask and not status.st_size
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and made_by_shell:
        os.fchmod(descriptor, 0o600)


def write_private_key(path: str, key: Ed25519PrivateKey | X25519PrivateKey) -> None:
    """Write `key` as PKCS #8 PEM, mode 0600. Raises as `write_new_file` does."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    write_new_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def read_signing_key(path: str) -> Ed25519PrivateKey:
    """The Ed25519 key in `path`.

    Raises:
        NotFoundError: no such file.
        RefusedError: others may read or write it.
        UsageError: not an unencrypted Ed25519 key in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = _read_private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} holds a key of another kind: Ed25519 is needed")
    return key


def read_sealing_key(path: str) -> X25519PrivateKey:
    """The X25519 key in `path`. Raises as `read_signing_key` does."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = _read_private_key(path)
    if not isinstance(key, X25519PrivateKey):
        raise UsageError(f"{path} holds a key of another kind: X25519 is needed")
    return key


def read_signer(path: str) -> CryptoSigner:
    """The Ed25519 key in `path` as securesystemslib signs with it. Raises as `read_signing_key` does."""
    from securesystemslib.signer import CryptoSigner

    return CryptoSigner(read_signing_key(path))


def _read_private_key(path: str) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_private_file(path)
    try:
        return load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a private key in PEM without a password") from error


def _read_private_file(path: str) -> bytes:
    try:
        # Non-blocking, as a FIFO under this name would otherwise hold us for ever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no key file {path}") from error
    except OSError as error:
        raise RefusedError(f"cannot read {path}: {error.strerror}") from error
    try:
        # Of the open file, so that what was checked is what is read; a folder would be no file to Python either.
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError(f"{path} is not a regular file")
        if status.st_mode & _OTHERS:
            raise RefusedError(
                f"the private key {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"make a new key if others may have read it, else run 'chmod 600 {path}'",
            )
        if status.st_uid not in {os.geteuid(), 0}:
            raise RefusedError(f"the private key {path} belongs to another user (uid {status.st_uid})")
        return os.read(handle, _KEY_FILE_MAX)
    finally:
        os.close(handle)
