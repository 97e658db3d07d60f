"""How the files of a process and an environment differ from what was frozen of them, in sentences.

A deployment that goes on reads none of them: people who have edited one read here that it does not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from orchestrator.files.environment import environment_path, load_environment
from orchestrator.files.process import load_process
from orchestrator.plan.leave_out import Selection
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import MachineStep, Plan, PlannedMachine, PlannedRelay
from orchestrator.releases.release import Release
from orchestrator.trust.keyring import people_in
from relay.errors import WaystationError
from relay.written.yaml_positions import PlanError

if TYPE_CHECKING:
    from orchestrator.journal.journal import Journal
    from orchestrator.paths import Paths


@dataclass(frozen=True, slots=True)
class Files:
    """Where people's files lie now.

    Attributes:
        process: path of the process's; empty: nothing is compared.
        environment: path of the environment's; empty: where one of its name lies.
    """

    process: str = ""
    environment: str = ""


NO_FILES: Final = Files()
_COUNTS: Final = "what was frozen counts"


def what_differs(paths: Paths, journal: Journal, deployment: str, files: Files) -> list[str]:
    """One sentence for each file that is not what the deployment was made of; none where all are, or where there are none
    of this project.

    Args:
        paths: of this orchestrator.
        journal: where the release is.
        deployment: its ULID.
        files: as they are now.

    Never raises: where something cannot be compared, that is the sentence.
    """
    try:
        plan = msgspec.json.decode(journal.plan(deployment), type=Plan)
        release = msgspec.json.decode(journal.release(plan.project, plan.label).document, type=Release)
        found = list(_of_process(release, files.process)) if _is_of(plan.project, files.process) else []
        path = files.environment or environment_path(plan.environment)
        if files.process and os.path.exists(path):
            frozen = os.path.join(paths.deployment(deployment), "process", release.process_name)
            found += _of_environment(paths, plan, frozen, path)
    except (WaystationError, msgspec.MsgspecError, OSError) as error:
        return [f"whether files differ from what was frozen cannot be said: {error}"]
    return found


# --- the process and its scripts


def _is_of(project: str, path: str) -> bool:
    """Whether the process there is of this project; one that cannot be read any more counts as such."""
    if not path or not os.path.exists(path):
        return False
    try:
        return load_process(path).value.project == project
    except PlanError:
        return True


def _of_process(release: Release, path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        if file.read() != release.process.encode():
            yield f"{path} is not what {release.label} was made of: {_COUNTS}"
    folder = os.path.dirname(os.path.abspath(path))
    for frozen in release.files:
        try:
            with open(os.path.join(folder, frozen.path), "rb") as file:
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == frozen.sha256
        except OSError as error:
            yield f"{frozen.path} cannot be read any more ({error.strerror}): {_COUNTS}"
            continue
        if not is_same:
            yield f"{frozen.path} is not what {release.label} was made of: {_COUNTS}"


# --- the environment


def _of_environment(paths: Paths, plan: Plan, process: str, path: str) -> list[str]:
    try:
        again = make_plan(
            load_process(process),
            load_environment(path),
            label=plan.label,
            packages=plan.packages,
            scripts=plan.scripts,
            prompts={},
            people=people_in(paths.trust, plan.environment),
            author=plan.author,
            selection=Selection(exclude=tuple(plan.excluded), why=next(iter(plan.excluded.values()), "")),
        )
    except PlanError as error:
        # What a prompt was answered is known no more; only what stands in this file is told.
        mine = [mistake for mistake in error.mistakes if os.path.abspath(mistake.file) == os.path.abspath(path)]
        return [f"{path} cannot be planned with any more ({mine[0].text}): {_COUNTS}"] if mine else []
    parts = list(dict.fromkeys(_parts(plan, again)))
    return [f"{path} has changed since, in {', '.join(parts)}: {_COUNTS}"] if parts else []


def _parts(old: Plan, new: Plan) -> Iterator[str]:
    """What two plans of one process have otherwise, by the words of an environment."""
    yield from (f"relay {name}" for name in _changed(_named(old.relays), _named(new.relays)))
    yield from (f"feed {name}" for name in _changed(old.feeds, new.feeds))
    yield from (f"secret {name}" for name in _changed(old.secrets, new.secrets))
    machines = _changed(_named(old.machines), _named(new.machines))
    steps = {step.number: step for step in new.steps}
    is_whole = not old.retries and old.beside is None
    # A plan that goes on or goes back has some of the machines and steps alone.
    known = {machine.name for machine in old.machines}
    yield from (f"machine {name}" for name in machines if is_whole or name in known)
    for step in old.steps:
        other = steps.get(step.number)
        if isinstance(step, MachineStep) and isinstance(other, MachineStep):
            if step.rotation != other.rotation and step.rotation is not None:
                yield f"rotation {step.rotation.name}"
            turns = _changed({t.machine: t for t in step.turns}, {t.machine: t for t in other.turns})
            yield from (f"machine {name}" for name in turns if is_whole or name in known)
    for name in ("pre_acquire", "acquire", "notify"):
        if getattr(old, name) != getattr(new, name):
            yield name


def _named(values: Iterable[PlannedRelay | PlannedMachine]) -> dict[str, Any]:
    return {value.name: value for value in values}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of what is there in one alone, or not the same in both."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
