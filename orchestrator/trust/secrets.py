"""Secrets: read where they live at the moment of use, held by values that show and give away nothing.

Two types keep what must not leave the server from leaving it: only a `MachineSecret` can be sealed, and the store hands
one out only for names that the plan lists as meant for machines.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn

from orchestrator.files.script_names import environment_name
from relay.errors import NotFoundError, RefusedError, WaystationError

if TYPE_CHECKING:
    from orchestrator.plan.plan import SecretSource

SECRET_MIN: Final = 4
"""Characters. Anything shorter cannot be masked in output without masking half of the words of it."""
SECRET_MAX: Final = 64 << 10
"""Bytes of a value."""

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_LAST_LINE_FEED: Final = re.compile(r"\r?\n\Z")


class SecretRefusedError(RefusedError):
    """A secret that cannot be used. The text names the secret and where it lies, never what it holds."""


class ServerSecret:
    """A value that is used on the server and shown nowhere: no `repr`, no comparison by value, no copy, no pickle.

    It is no `str`, so that no encoder takes it for one; who needs the text says so by `reveal`.
    """

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        """Check the value.

        Raises:
            SecretRefusedError: fewer characters than `SECRET_MIN`, more bytes than `SECRET_MAX`, or nothing that an
                environment can hold.
        """
        if len(value) < SECRET_MIN:
            raise SecretRefusedError(
                f"the secret {name!r} has fewer than {SECRET_MIN} characters, which no log can mask"
            )
        if "\0" in value or not 0 < _size(value) <= SECRET_MAX:
            raise SecretRefusedError(f"the secret {name!r} is no text of at most {SECRET_MAX >> 10} KiB without NUL")
        self.name = name
        self._value = value

    def reveal(self) -> str:
        """The value itself: for the environment of a process, a header, or a seal, and nothing that is kept."""
        return self._value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self!r} is never copied or serialised")


class MachineSecret(ServerSecret):
    """A value that may go to a machine, sealed to its agent."""

    __slots__ = ()


class SecretStore:
    """Where the values of a deployment's secrets are read; nothing is cached, so a rotated secret is the new one."""

    def __init__(self, sources: Mapping[str, SecretSource], machine_secrets: Collection[str] = ()) -> None:
        """Know the names.

        Args:
            sources: where each value is read.
            machine_secrets: the names whose values may go to machines.
        """
        self._sources = dict(sources)
        self._for_machines = frozenset(machine_secrets)

    def __repr__(self) -> str:
        return f"<SecretStore of {', '.join(sorted(self._sources)) or 'nothing'}>"

    @property
    def files(self) -> frozenset[str]:
        """Paths of files that hold secrets: what must never be copied anywhere."""
        return frozenset(source.file for source in self._sources.values() if source.file)

    def value(self, name: str) -> ServerSecret:
        """The value of `name`, read now.

        Raises:
            NotFoundError: no such secret, or nothing where it should be.
            SecretRefusedError: others can read its file, or it is too short, too long, or no text.
        """
        return ServerSecret(name, _read(name, self._source(name)))

    def machine_value(self, name: str) -> MachineSecret:
        """The value of a secret that may leave the server. Raises as `value`, and where `name` may not leave."""
        if name not in self._for_machines:
            raise SecretRefusedError(f"the secret {name!r} is not available to machines and stays on the server")
        return MachineSecret(name, _read(name, self._source(name)))

    def environment(self, names: Iterable[str]) -> dict[str, str]:
        """What a server script gets: `SECRET_<NAME>` for each name. Only ever for a process. Raises as `value`."""
        return {variable_of(name): self.value(name).reveal() for name in names}

    def sealed(self, names: Iterable[str], sealing_public: str, operation: str) -> dict[str, bytes]:
        """What a machine script gets: `SECRET_<NAME>`, each value sealed to that agent for that operation alone.

        Raises as `machine_value`.
        """
        return {
            variable_of(name): seal_for_machine(self.machine_value(name), sealing_public, operation) for name in names
        }

    def check(self) -> None:
        """Read every secret once, so that none is missed in the middle of a deployment.

        Raises:
            SecretRefusedError: one or more cannot be used; the message names all of them.
        """
        wrong = []
        for name in sorted(self._sources):
            try:
                self.value(name)
            except WaystationError as error:
                wrong.append(str(error))
        if wrong:
            raise SecretRefusedError("; ".join(wrong), hint="Nothing was started")

    def _source(self, name: str) -> SecretSource:
        try:
            return self._sources[name]
        except KeyError:
            raise NotFoundError(
                f"no secret is named {name!r}", hint="The environment's file says where each one is"
            ) from None


def read_secret(name: str, source: SecretSource) -> ServerSecret:
    """One value that belongs to no store, such as a relay's token. Raises as `SecretStore.value`."""
    return ServerSecret(name, _read(name, source))


def seal_for_machine(secret: MachineSecret, sealing_public: str, operation: str) -> bytes:
    """`secret`, readable by the one agent that holds the other half of `sealing_public` (hex), for `operation` alone.

    Raises:
        TypeError: not a `MachineSecret`: what was not meant for machines has no way out.
    """
    from agent.orders.envelopes import seal, secret_context

    if not isinstance(secret, MachineSecret):
        raise TypeError(f"{secret!r} never leaves the server")
    return seal(secret.reveal().encode(), sealing_public, secret_context(operation, variable_of(secret.name)))


def variable_of(name: str) -> str:
    """The name under which a script finds the secret in its environment: `SECRET_APP_KEY` for `app-key`."""
    return environment_name("SECRET_", name)


def _read(name: str, source: SecretSource) -> str:
    """The text, without the one line feed that editors leave at the end of a file. Raises as `SecretStore.value`."""
    if not source.file:
        value = os.environ.get(source.env)
        if value is None:
            raise NotFoundError(f"the secret {name!r} is not there: the environment variable {source.env} is not set")
        return value
    try:
        text = _read_file(name, source.file).decode()
    except UnicodeDecodeError:
        # The error holds the bytes; nothing of it may be told.
        raise SecretRefusedError(f"the secret {name!r}: {source.file} is not UTF-8 text") from None
    return _LAST_LINE_FEED.sub("", text)


def _read_file(name: str, path: str) -> bytes:
    try:
        # Non-blocking, as a FIFO under this name would otherwise hold us for ever. A link is followed: that is how
        # systems that hand out secrets mount them.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"the secret {name!r} is not there: no file {path}") from error
    except OSError as error:
        raise SecretRefusedError(f"the secret {name!r}: cannot read {path}: {error.strerror}") from error
    try:
        # Of the open file, so that what was checked is what is read.
        _judge(name, path, os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(SECRET_MAX + len(b"\r\n") + 1)
    finally:
        os.close(descriptor)


def _judge(name: str, path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretRefusedError(f"the secret {name!r}: {path} is not a regular file")
    if status.st_mode & _OTHERS:
        raise SecretRefusedError(
            f"the secret {name!r}: {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"Make a new secret if others may have read it, else run 'chmod 600 {path}'",
        )


def _size(value: str) -> int:
    """Bytes in UTF-8; 0 where it is none (an environment variable may hold any bytes)."""
    try:
        return len(value.encode())
    except UnicodeEncodeError:
        return 0
