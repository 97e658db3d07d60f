"""Which fences agents have seen, as far as they concern one project in one environment. Pure.

An agent that understands it keeps a fence for each project; what it says of no project concerns all of them. An older one
keeps one for the environment, so that there only one deployment at a time leads, whichever project it is of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from agent.orders.orders import PROJECT_FENCES, FenceSeen, Presence


def seen_of(present: Mapping[str, Presence], project: str, environment: str) -> dict[str, list[FenceSeen]]:
    """By machine, in the order of their names: what a fence of this project has to be above."""
    return {name: _seen(presence, project, environment) for name, presence in sorted(present.items())}


def other_orchestrators(seen: Mapping[str, Collection[FenceSeen]], journal: str) -> list[str]:
    """Deployments of other journals that are not over, in words."""
    return [
        f"{name} knows deployment {fence.deployment}"
        for name, fences in seen.items()
        for fence in fences
        if fence.open and fence.journal != journal
    ]


def older_agents(present: Mapping[str, Presence], environment: str, leading: Collection[str]) -> list[str]:
    """Machines whose agents keep one fence for the environment, while one of the deployments `leading` leads there."""
    return [
        name
        for name, presence in sorted(present.items())
        if PROJECT_FENCES not in presence.understands
        and (fence := presence.fences.get(environment)) is not None
        and fence.open
        and fence.deployment in leading
    ]


def _seen(presence: Presence, project: str, environment: str) -> list[FenceSeen]:
    if PROJECT_FENCES not in presence.understands:
        return [presence.fences[environment]] if environment in presence.fences else []
    fences = presence.project_fences.get(environment, {})
    return [fences[name] for name in (project, "") if name in fences]
