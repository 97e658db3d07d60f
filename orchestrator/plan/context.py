"""What every part of the planning stands on: both files, what may be used in each place, and the mistakes so far.

Nothing here raises for a mistake: it is noted, and planning goes on with something harmless, so that one run finds all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.files.environment import EnvironmentFile, Machine
from orchestrator.files.process import PreAcquireStep, ProcessFile, Prompt, Retry, Step, Undo
from orchestrator.files.script_files import Files, ScriptPathError
from orchestrator.files.script_names import clashes, environment_name
from orchestrator.files.values import DURATION_MAX, seconds
from orchestrator.files.variables import Definition, ElsewhereError, Scope, VariableError, layered, names_in
from orchestrator.plan.plan import FrozenFile, PlannedPackage, SecretSource, ServerRun
from relay.written.yaml_positions import Mistake, Place, shown

SCRIPT_SECONDS = 600.0
_SECRETS_MAX = 64
_SHELLS = frozenset({"sh", "ash", "bash", "dash", "ksh", "zsh", "perl", "python", "python3", "ruby"})
_SHELLS_TO_THE_END = frozenset({"cmd", "pwsh", "powershell"})
"""To these, all that follows the switch is program text."""


@dataclass(slots=True)
class Ground:
    """See above.

    Attributes:
        packages: versions of the release by their name in the process.
        people: names that trust.json knows and that may decide in this environment.
        author: who made the release; empty where its key has no name, None where nobody made it yet.
        left_out: machines that a person leaves out, and why.
        needed_secrets: secrets that something uses, with the place that asked first.
    """

    process: ProcessFile
    environment: EnvironmentFile
    label: str
    packages: Mapping[str, PlannedPackage]
    prompts: Mapping[str, str]
    files: Files
    people: Collection[str] = ()
    author: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    needed_secrets: dict[str, Place] = field(default_factory=dict)
    _layers: list[dict[str, Definition]] = field(default_factory=list)
    _asked: dict[str, Definition] = field(default_factory=dict)
    _scopes: dict[tuple[str, str], Scope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        written = self.process.value.variables
        from_process = {name: value for name, value in written.items() if not isinstance(value, Prompt)}
        self._layers = [
            _definitions(from_process, self.process.at("variables")),
            _definitions(self.environment.value.variables, self.environment.at("variables")),
        ]
        self._asked = self._answers({name: value for name, value in written.items() if isinstance(value, Prompt)})
        self._check_names()

    def wrong(self, place: Place, text: str) -> None:
        self.mistakes.append(place.mistake(text))

    def wrong_option(self, option: str, text: str) -> None:
        self.mistakes.append(Mistake("", 0, option, text))

    # --- variables

    def server_scope(self, package: str = "") -> Scope:
        """What may be named where no machine is concerned."""
        return self._scope("", package, lambda: layered(*self._layers, self._asked), self._facts(package))

    def machine_scope(self, name: str, package: str = "") -> Scope:
        """What may be named on a machine: process < environment < role < machine < prompt."""
        machine = self.machine(name)
        facts = {"machine.name": name, "machine.address": machine.address, "machine.site": machine.site}
        facts |= {f"machine.tags.{tag}": str(value) for tag, value in machine.tags.items()}
        return self._scope(name, package, lambda: self._machine_layers(name, machine), facts | self._facts(package))

    def fill(
        self,
        scope: Scope,
        text: str,
        place: Place,
        fits: Callable[[str], object] | None = None,
        expected: str = "",
    ) -> str:
        """`text` with its variables; empty where that is a mistake. It is one, too, where the result does not fit."""
        try:
            filled = scope.fill(text)
        except VariableError as error:
            # A variable that needs another place is well defined: what is wrong is to name it here.
            self.wrong(place if isinstance(error, ElsewhereError) else error.place or place, error.text)
            return ""
        if fits is not None and not fits(filled):
            self.wrong(place, f"{shown(filled)}: expected {expected}")
        return filled

    def fill_command(self, scope: Scope, command: Iterable[str], place: Place) -> tuple[str, ...]:
        """An argument list with its variables. None goes into the text of a shell: there it would be program."""
        given = tuple(command)
        for index in _program_texts(given):
            if names_in(given[index]):
                self.wrong(
                    place.below(index),
                    "puts a variable into the program text of a shell: read it from the environment there (VAR_…), "
                    "give it as an argument behind the text, or write '$${' for the shell's own '${'",
                )
        return tuple(self.fill(scope, text, place.below(index)) for index, text in enumerate(given))

    def seen_variables(self, scope: Scope) -> dict[str, str]:
        """VAR_<NAME> for every variable that has a value in this place."""

        def note(error: VariableError) -> None:
            if error.place is not None:
                self.wrong(error.place, error.text)

        return {environment_name("VAR_", name): value for name, value in scope.values(note).items()}

    def common_variables(self, step: str, package: str = "") -> dict[str, str]:
        """What every script sees, wherever it runs."""
        seen = {
            "ENVIRONMENT": self.environment.value.environment,
            "PROJECT": self.process.value.project,
            "RELEASE": self.label,
            "STEP": step,
        }
        planned = self.packages.get(package)
        return seen | ({"VERSION": planned.version, "PACKAGE_ID": planned.id} if planned else {})

    def machine(self, name: str) -> Machine:
        machine = self.environment.value.machines[name]
        assert isinstance(machine, Machine)  # noqa: S101 - planning selects only these
        return machine

    # --- scripts, commands, times

    def frozen(self, file: ProcessFile | EnvironmentFile, path: str, place: Place) -> FrozenFile:
        """The script `path` of `file`, hashed."""
        try:
            return FrozenFile(file.folder, path, self.files.script(file.folder, path))
        except ScriptPathError as error:
            self.wrong(place, error.message)
            return FrozenFile(file.folder, path, "")

    def time_limit(self, duration: str | None, place: Place, default: float) -> float:
        """Seconds that something may take."""
        value = self.seconds(duration, place, default)
        if duration is not None and value == 0:
            self.wrong(place, f"{duration} is over before anything began: expected a longer time")
        return value

    def stall_limit(self, duration: str | None, place: Place) -> float | None:
        """Seconds that something may print nothing; None: for ever. `place` is that which may have `stall`."""
        return None if duration is None else self.time_limit(duration, place.below("stall"), 0.0)

    def seconds(self, duration: str | None, place: Place, default: float) -> float:
        if duration is None:
            return default
        value = seconds(duration)
        if value > DURATION_MAX:
            self.wrong(place, f"{duration} is too long: expected at most 7d")
        return value

    def server_run(
        self,
        name: str,
        place: Place,
        what: PreAcquireStep | Undo | Step,
        variables: Mapping[str, str],
        scope: Scope,
    ) -> ServerRun:
        """A script of the process, or its commands, on the server. An undo may always be run again."""
        if (what.script is None) == (not what.commands):
            found = "has both script and commands" if what.commands else "runs nothing"
            self.wrong(place, f"{found}: expected exactly one of the keys script, commands")
        attempts, delay = self.retries(what.retry, place)
        return ServerRun(
            name,
            script=None if what.script is None else self.frozen(self.process, what.script, place.below("script")),
            commands=tuple(
                self.fill_command(scope, command, place.below("commands", index))
                for index, command in enumerate(what.commands)
            ),
            timeout=self.time_limit(what.timeout, place.below("timeout"), SCRIPT_SECONDS),
            stall=self.stall_limit(what.stall, place),
            attempts=attempts,
            delay=delay,
            idempotent=isinstance(what, Undo) or what.idempotent,
            variables={**variables, **self.seen_variables(scope)},
            secrets=self.process_secrets(what.secrets, place.below("secrets")),
        )

    def retries(self, retry: Retry | None, place: Place) -> tuple[int, float]:
        """Attempts, and seconds between them."""
        if retry is None:
            return 1, 10.0
        return retry.attempts, self.seconds(retry.delay, place.below("retry", "delay"), 10.0)

    # --- secrets

    def process_secrets(self, names: tuple[str, ...], place: Place) -> tuple[str, ...]:
        """Secrets that the process itself uses, which it must have declared."""
        for index, name in enumerate(names):
            if name not in self.process.value.secrets:
                self.wrong(
                    place.below(index),
                    f"there is no secret {shown(name)}: declare it under secrets: in {self.process.name}, "
                    "with available_to",
                )
        return self.use_secrets(tuple(name for name in names if name in self.process.value.secrets), place)

    def use_secrets(self, names: tuple[str, ...], place: Place) -> tuple[str, ...]:
        """Note that these are needed, and see that one script can tell them apart."""
        for name in names:
            self.needed_secrets.setdefault(name, place)
        for first, second in clashes(names):
            self.wrong(place, f"{shown(first)} and {shown(second)} are both SECRET_{environment_name('', first)} there")
        if len(names) > _SECRETS_MAX:
            self.wrong(place, f"{len(names)} secrets: expected at most {_SECRETS_MAX}")
        return tuple(dict.fromkeys(names))

    def check_source(self, source: SecretSource, place: Place) -> None:
        """A file that git tracks is no secret."""
        if source.file and self.files.is_tracked(source.file):
            self.wrong(
                place.below("file"),
                f"git tracks {source.file}: everyone with the repository has the secret; change it, and keep it elsewhere",
            )

    # --- inside

    def _facts(self, package: str) -> dict[str, str]:
        facts = {"release.label": self.label, "environment": self.environment.value.environment}
        planned = self.packages.get(package)
        if package:
            # A package without a version is a mistake of its own; its name is known all the same.
            facts |= {
                "package.id": planned.id if planned else "",
                "package.version": planned.version if planned else "",
            }
        return facts

    def _scope(
        self, machine: str, package: str, layers: Callable[[], dict[str, Definition]], facts: dict[str, str]
    ) -> Scope:
        key = (machine, package)
        if key not in self._scopes:
            self._scopes[key] = Scope(layers(), facts)
        return self._scopes[key]

    def _machine_layers(self, name: str, machine: Machine) -> dict[str, Definition]:
        own = _definitions(machine.variables, self.environment.at("machines", name, "variables"))
        of_roles: dict[str, Definition] = {}
        for role in machine.roles:
            values = self.environment.value.roles[role].variables if role in self.environment.value.roles else {}
            place = self.environment.at("roles", role, "variables")
            for variable, definition in _definitions(values, place).items():
                other = of_roles.setdefault(variable, definition)
                if other.text != definition.text and variable not in {*own, *self._asked}:
                    self.wrong(
                        self.environment.at("machines", name, "roles"),
                        f"two roles give {shown(variable)} different values: set it under the machine's own variables",
                    )
        return layered(*self._layers, of_roles, own, self._asked)

    def _answers(self, asked: Mapping[str, Prompt]) -> dict[str, Definition]:
        answers = {}
        for name, prompt in asked.items():
            place = self.process.at("variables", name)
            if name in self.prompts:
                answers[name] = Definition(self._answer(name, prompt, place), literal=True, place=place)
            elif name not in self.environment.value.variables:
                self.wrong(place, f"is asked for ({prompt.prompt}): give it with --variable {name}=VALUE")
                self._layers[0][name] = Definition("", literal=True, place=place)
        for name in self.prompts:
            if name not in asked:
                words = ", ".join(asked) or "none"
                self.wrong_option(
                    f"--variable {name}", f"is not asked for by {self.process.name}: expected one of {words}"
                )
        return answers

    def _answer(self, name: str, prompt: Prompt, place: Place) -> str:
        answer = self.prompts[name]
        try:
            if "\0" in answer or (prompt.match and not re.fullmatch(prompt.match, answer)):
                expected = f"what {prompt.match} describes" if prompt.match else "text without NUL"
                self.wrong_option(f"--variable {name}", f"{shown(answer)}: expected {expected} ({prompt.prompt})")
        except re.error as error:
            self.wrong(place.below("match"), f"is no regular expression: {error}")
        return answer

    def _check_names(self) -> None:
        every: dict[str, Place] = {}
        for place, names in self._definition_places():
            for name in names:
                every.setdefault(name, place.below(name))
                if name == "environment":
                    self.wrong(place.below(name), "is what the environment is called: choose another name")
        for first, second in clashes(every):
            seen = environment_name("VAR_", first)
            self.wrong(every[second], f"scripts would see it and {shown(first)} both as {seen}: rename one")

    def _definition_places(self) -> Iterator[tuple[Place, Iterable[str]]]:
        environment = self.environment
        yield self.process.at("variables"), self.process.value.variables
        yield environment.at("variables"), environment.value.variables
        for role, value in environment.value.roles.items():
            yield environment.at("roles", role, "variables"), value.variables
        for name, machine in environment.value.machines.items():
            if isinstance(machine, Machine):
                yield environment.at("machines", name, "variables"), machine.variables


def _definitions(values: Mapping[str, object], place: Place) -> dict[str, Definition]:
    return {name: Definition(str(value), place=place.below(name)) for name, value in values.items()}


def _program_texts(command: tuple[str, ...]) -> Iterable[int]:
    """Indexes of the arguments that a shell or interpreter in this command would read as program text."""
    for index, program in enumerate(command):
        name = re.split(r"[\\/]", program)[-1].lower().removesuffix(".exe")
        if name not in _SHELLS | _SHELLS_TO_THE_END:
            continue
        for switch in range(index + 1, len(command)):
            if re.fullmatch(r"-[A-Za-z]*[ce]|/[cCkK]|-[Cc]o?m?m?a?n?d?", command[switch]):
                end = len(command) if name in _SHELLS_TO_THE_END else min(switch + 2, len(command))
                return range(switch + 1, end)
    return ()
