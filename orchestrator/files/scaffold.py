"""The files that `waystation init` makes: commented, loadable, and refusing to act until they were edited."""

from __future__ import annotations

import os
import re
from typing import Final

from relay.errors import UsageError

_RELEASE: Final = """\
# What a release of this project does. `waystation release plan` checks it and contacts nothing.
format: 1
project: {project}

# Values for scripts (VAR_PORT) and for this file (${{port}}). The environment's, a role's and a machine's win, in this order.
variables:
  port: 8080
  # change: {{ prompt: "Change ticket", match: "CHG[0-9]{{6}}" }}    # asked for: --variable change=CHG000001

# Who may see a secret. Where its value comes from stands in the environment file.
# secrets:
#   app_key: {{ available_to: [web] }}
#   chat_hook: {{ available_to: server }}

packages:
  web: {{ id: {package} }}                   # feed: corp takes it from a feed where the depot lacks it

# Steps on the server before any byte moves; what undoes them always runs.
# pre_acquire:
#   - {{ name: open vpn, script: ops/vpn-up.sh, timeout: 2m, undo: ops/vpn-down.sh, until: finished }}

steps:
  # - {{ name: schema, run_on: server, deploy: db, script: ops/migrate.sh, timeout: 15m, required: true }}
  - name: web farm
    roles: [web]
    deploy: web
    to: /srv/{project}                       # releases/<label>-<ulid>, shared/, current
    strategy: rolling                        # one machine at a time
    # strategy: {{ rolling: {{ phases: [ {{ machines: 1 }}, {{ window: 25% }} ], min_in_service: 1 }} }}
    rotation: web                            # how that is done stands in the environment
    apply:                                   # on the machine, in order
      # - {{ name: configure, script: deploy/configure.sh }}
      - switch
      - {{ service: {project}, action: restart }}
    verify:
      - {{ http: "http://${{machine.address}}:${{port}}/", deadline: 2m }}     # expect: "${{package.version}}"
    # on_failure: ask                        # what to do with a machine whose new version is bad; or rollback, stop

# notify: [ {{ url_secret: chat_hook, on: [failed, finished, rotation_open] }} ]
"""

_ENVIRONMENT: Final = """\
# Where releases go: this file belongs to operations.
environment: production

relays:
  main: { url: "https://relay.example:7443", site: main, generic: true }      # token: { file: /etc/waystation/relay.token }

# feeds: { corp: { url: "https://feed.example/v3/index.json", secret: corp_feed } }

# How a machine leaves its load balancer and comes back. The scripts run on the server; they stand beside this file.
rotation:
  web: { before: lb/out.py, after: lb/in.py, probe: lb/state.py, timeout: 3m }   # secrets: [lb_token]

# secrets:
#   lb_token: { file: /etc/waystation/lb.token }       # a file that only this user can read, and that git does not track
#   corp_feed: { env: CORP_FEED }

# Who is asked by approvers: [team:shop]. `waystation trust person anna` gives her a key and a name.
# teams: { shop: [anna, ben] }

variables: { log_level: warn }

machines:
  # `waystation agent init` on the machine prints its key. Without it, no plan is made.
  web1: { address: 192.0.2.11, site: main, roles: [web], key: "" }
  web2: { address: 192.0.2.12, site: main, roles: [web], key: "" }
"""

_ROTATION: Final = '''\
#!/usr/bin/env python3
"""{what}

Runs on the server, may run again with the same machine (so it must be idempotent), and sees in its environment:
MACHINE, ADDRESS, SITE, TAG_*, RELEASE, VERSION, ATTEMPT, VAR_*, SECRET_* (those of `secrets:`){more}.
{end}
"""

import os
import sys

machine = os.environ["MACHINE"]

# Ask the balancer, then read the state back: many of them report errors as plain text with success.
{example}
sys.exit(f"{path} is not written yet: nothing was done for {{machine}}")
'''

_OUT: Final = _ROTATION.format(
    what="Take the machine out of its load balancer, and end once no request is under way there any more.",
    more="",
    end="Ends with 0 when the machine is out; with anything else it is not touched.",
    example="# For example: set server web/MACHINE state drain, then wait until its sessions are 0.",
    path="lb/out.py",
)
_IN: Final = _ROTATION.format(
    what="Put the machine back into its load balancer, and end once the balancer says that it is up.",
    more=",\nOUTCOME (deployed, not_started, kept_old, …)",
    end="Ends with 0 when the balancer sends requests there again.",
    example="# For example: set server web/MACHINE state ready, then wait until its status is UP.",
    path="lb/in.py",
)
_STATE: Final = _ROTATION.format(
    what="Say whether the machine is in service, and change nothing.",
    more="",
    end="Ends with 0 where it is in service, with 1 where it is not, with anything else where it cannot tell.",
    example='# For example: show stat, and look at the status of web/MACHINE. "Cannot tell" is what this file says so far.',
    path="lb/state.py",
).replace(
    'sys.exit(f"lb/state.py is not written yet: nothing was done for {machine}")',
    'print(f"lb/state.py is not written yet: nothing was asked for {machine}", file=sys.stderr)\nsys.exit(2)',
)

_SHELL: Final = """\
#!/bin/sh
# {what}
# It sees in its environment: ENVIRONMENT, PROJECT, RELEASE, STEP, ATTEMPT, VAR_*, SECRET_* (those of `secrets:`){more}.
set -eu

echo "{path} is not written yet" >&2
exit 1
"""

_NOTES: Final = """\
# Releases with Waystation

`release.yaml` says what a release does; `environments/production.yaml` says where it goes. To start:

1. Name your package and your service in `release.yaml`.
2. Run `waystation agent init` on each machine; write its key, address and site into `environments/production.yaml`.
3. Write `environments/lb/out.py`, `in.py` and `state.py`: until then they fail on purpose.
4. `waystation release plan` says what is still missing, with file and line.
"""


def write_scaffold(folder: str) -> list[str]:
    """Write the files into `folder` (made where it is missing), and say which, relative to it. What is there stays.

    Raises:
        UsageError: a folder or file cannot be written.
    """
    written = []
    for path, text in _files(os.path.basename(os.path.abspath(folder))).items():
        target = os.path.join(folder, *path.split("/"))
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if _is_script(path) else 0o644)
        except FileExistsError:
            if os.path.lexists(target):
                continue
            raise UsageError(f"{os.path.dirname(target)} is no folder: choose another place") from None
        except OSError as error:
            raise UsageError(f"cannot write {target}: {error.strerror}") from error
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        written.append(path)
    return written


def _files(name: str) -> dict[str, str]:
    project = "-".join(re.findall(r"[A-Za-z0-9_]+", name))[:40].strip("-").lower() or "webshop"
    package = ".".join(word.capitalize() for word in project.split("-"))
    on_machine = ", MACHINE, ROOT, VERSION"
    return {
        "release.yaml": _RELEASE.format(project=project, package=f"Acme.{package}"),
        "environments/production.yaml": _ENVIRONMENT,
        "environments/lb/out.py": _OUT,
        "environments/lb/in.py": _IN,
        "environments/lb/state.py": _STATE,
        "ops/vpn-up.sh": _SHELL.format(what="Runs on the server before any byte moves.", more="", path="ops/vpn-up.sh"),
        "ops/vpn-down.sh": _SHELL.format(
            what="Undoes ops/vpn-up.sh; it always runs, and may run where nothing was opened.",
            more=", UNDO=1",
            path="ops/vpn-down.sh",
        ),
        "deploy/configure.sh": _SHELL.format(
            what="Runs on each machine, in the folder ROOT.", more=on_machine, path="deploy/configure.sh"
        ),
        "WAYSTATION.md": _NOTES,
    }


def _is_script(path: str) -> bool:
    return path.endswith((".py", ".sh"))
