#!/bin/sh
# Makes the archives of this folder: real commands of commit f8f3ed2, whose code comes out of the project's own history.
# Usage: tests/data/f8f3ed2/make.sh DESTINATION      (once `deploy/setup.sh` has made .venv)
# README.md, beside this file, says what the archives hold. Made again, everything has other keys, ids and times.
set -eu

commit=f8f3ed2
work=/tmp/waystation-$commit # stands in what is made, wherever a path must be absolute

if [ "$(id -u)" = 0 ] && [ "${1-}" != --named ]; then
    exec unshare --uts "$0" --named "$@" # the journal says on which host it was written
fi
if [ "${1-}" = --named ]; then
    shift
    hostname ops1
fi

mkdir -p "$1"
destination=$(cd "$1" && pwd)
repository=$(cd "$(dirname "$0")/../../.." && pwd)
mkdir -m 700 "$work"
mkdir "$work/code" "$work/made"
git -C "$repository" archive "$commit" relay agent orchestrator | tar -x -C "$work/code"

export HOME="$work" LOGNAME=ann PYTHONPATH="$work/code" PYTHONDONTWRITEBYTECODE=1 WAYSTATION_HOME="$work/made/origin"
PATH=/usr/bin:/bin
cd "$work/made"

waystation() { "$repository/.venv/bin/python" -P -m relay.main "$@"; }

is_running() { kill -0 "$1" 2>/dev/null; }

started=
finish() {
    for process in $started; do
        if is_running "$process"; then kill "$process"; fi
    done
    cd /
    rm -r "$work"
}
trap finish EXIT

# Starts a process that says "ready at URL" once it works: start LOG WORD… Its number is then in $process, the URL in $url.
start() {
    log=$work/$1.log
    shift
    "$repository/.venv/bin/python" -P -m relay.main "$@" >"$log" 2>&1 &
    process=$!
    started="$started $process"
    until url=$(sed -n 's/.* ready at //p' "$log" 2>/dev/null) && [ -n "$url" ]; do
        is_running "$process" || { cat "$log" >&2 && exit 1; }
        sleep 0.05
    done
}

# --- an origin with two packages, one of them in two versions

# Writes one version's files: text, a program with an execute bit, an empty file, and what a compiler might have made.
write_application() {
    "$repository/.venv/bin/python" - "$1" "$2" <<'PYTHON'
import pathlib, random, sys

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
machine_code = random.Random("Acme.Web").randbytes(6_000)
symbols = b"".join(b"Acme.Web.Controllers.Cart%05d\0" % number for number in range(3_000))
stamp = b"Version=" + version.encode()
(folder / "wwwroot").mkdir(parents=True)
(folder / "version.txt").write_text(f"{version}\n")
(folder / "Acme.Web.dll").write_bytes(b"MZ\x90\0" + machine_code[:4_000] + stamp + machine_code[4_000:] + symbols)
(folder / "appsettings.json").write_text('{"greeting": "Good morning", "items": %s}\n' % list(range(500)))
(folder / "wwwroot" / "gr\u00fc\u00dfe.txt").write_text("Hello, site!\n" * 40)
(folder / "wwwroot" / "empty.css").touch()
(folder / "run.sh").write_text("#!/bin/sh\necho hello\n")
(folder / "run.sh").chmod(0o755)
PYTHON
}

# A package by another hand: what compressed it is no encoder that we know, so its nupkg cannot be made without bytes of
# it; and as much noise as it takes to measure a line.
write_tools() {
    "$repository/.venv/bin/python" - "$1" <<'PYTHON'
import random, sys, zipfile, zlib

nuspec = (
    '<?xml version="1.0"?><package xmlns="http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd"><metadata>'
    "<id>Acme.Tools</id><version>2.0.0</version><authors>Acme</authors><description>Tools</description>"
    "</metadata></package>"
)
zipfile._get_compressor = lambda method, _: zlib.compressobj(9, method, -15, 1, zlib.Z_RLE) if method else None
with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as package:
    for name, text in (("Acme.Tools.nuspec", nuspec), ("tools/words.txt", "one two three four\n" * 100)):
        package.writestr(zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6)), text, zipfile.ZIP_DEFLATED)
    noise = random.Random("Acme.Tools").randbytes(20_000)
    package.writestr(zipfile.ZipInfo("tools/noise.bin", (2026, 1, 2, 3, 4, 6)), noise, zipfile.ZIP_STORED)
    package.comment = b"packed by hand"
PYTHON
}

waystation trust init
for version in 1.0.0 1.1.0; do
    write_application "$work/packed/$version" "$version"
    waystation package pack "$work/packed/$version" --id Acme.Web --version "$version" --output "$work/Acme.Web.$version.nupkg"
    waystation package add "$work/Acme.Web.$version.nupkg"
done
write_tools "$work/Acme.Tools.2.0.0.nupkg"
waystation package add "$work/Acme.Tools.2.0.0.nupkg"

# --- a relay that has one of them, and a nupkg that it made again; two machines

start relay relay serve --listen 127.0.0.1:0 --store "disk:$work/made/relay" --site fra
relay=$url relay_process=$process
waystation package replicate Acme.Web 1.0.0 --relay "$relay"
waystation package replicate Acme.Tools 2.0.0 --relay "$relay" --exact
waystation package fetch Acme.Web 1.0.0 --relay "$relay" --output "$work/fetched.nupkg"

# Makes a machine and starts its agent. Its fingerprint is then in $key.
add_machine() {
    home=$work/made/machines/$1
    key=$(
        waystation agent init --home "$home" --name "$1" --site fra --relay "$relay" --trust origin/trust/trust.json --json |
            sed -n 's/.*"fingerprint": "\(.*\)".*/\1/p'
    )
    start "$1" agent serve --home "$home"
}
add_machine web1
key1=$key
add_machine web2
key2=$key

# --- a process with everything that leaves a trace, released twice; web2 is left out of rotation by the second

mkdir -p project/environments/lb project/deploy project/ops
script() {
    printf '#!/bin/sh\n%s\n' "$2" >"project/$1"
    chmod 755 "project/$1"
}
script environments/lb/out.sh 'mkdir -p "$HOME/balancer" && echo out >"$HOME/balancer/$MACHINE"'
script environments/lb/in.sh 'echo "in $OUTCOME" >"$HOME/balancer/$MACHINE"'
script deploy/configure.sh 'mkdir -p shared && printf "%s" "$SECRET_APP_KEY" | wc -c >shared/key-length'
script deploy/start.sh '[ "$VAR_FATE" = well ] || exit 1
echo "$VERSION" >>shared/starts
echo "started $VERSION on $MACHINE"'
script deploy/check.sh 'cat current/version.txt'
script ops/road.sh 'echo "road: ${UNDO:-0}"'
(umask 077 && echo "a throw-away secret" >project/app.key)
cat >project/release.yaml <<YAML
format: 1
project: shop
packages: { web: Acme.Web }
variables: { fate: well }
secrets: { app_key: { available_to: [web] } }
pre_acquire:
  - { name: open the road, script: ops/road.sh, undo: ops/road.sh }
steps:
  - name: web farm
    roles: [web]
    deploy: web
    to: $work/made/srv/\${machine.name}
    strategy: rolling
    rotation: web
    apply: [ { script: deploy/configure.sh, secrets: [app_key] }, switch, { script: deploy/start.sh } ]
    verify: [ { command: [deploy/check.sh] } ]
    on_failure: stop
  - { name: tell, run_on: server, commands: [ [echo, "released \${release.label}"] ], when: always }
YAML
write_environment() {
    cat >environments/production.yaml <<YAML
environment: production
relays: { fra: { url: "$relay", site: fra } }
secrets: { app_key: { file: $work/made/project/app.key } }
rotation: { web: { before: lb/out.sh, after: lb/in.sh } }
machines:
  web1: { address: 127.0.0.1, site: fra, roles: [web], key: "$key1" }
  web2: { address: 127.0.0.1, site: fra, roles: [web], key: "$key2", variables: { fate: $1 } }
YAML
}
cd project
write_environment well
waystation release deploy 1.0.0 --environment production --package web=1.0.0
write_environment ill
! waystation release deploy 1.1.0 --environment production --package web=1.1.0
waystation release status
waystation rotation list
cd ..

# --- everything ends as an operator ends it, and is packed

for process in $started; do
    [ "$process" = "$relay_process" ] || { kill "$process" && wait "$process" || true; }
done
kill "$relay_process" && wait "$relay_process"
started=

pack() {
    archive=$destination/$1.tar.xz
    shift
    tar --create --sort=name --owner=root:0 --group=root:0 "$@" | xz -9e >"$archive"
}
pack relay relay
pack depot origin/depot
pack machines machines srv
pack origin --exclude=origin/depot origin project
ls -l "$destination"
