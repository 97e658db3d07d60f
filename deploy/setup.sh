#!/bin/sh
# Makes .venv and installs Waystation and its tools into it; installs the programs that the demo and the tests start.
# As root on Debian it installs what is missing with apt; otherwise it says what is missing and stops.
# Usage: deploy/setup.sh [--libraries current|oldest|newest] [PROGRAM…] [--optional PROGRAM…]
# Libraries are those of deploy/locks/current; `oldest` and `newest` make .venv-oldest and .venv-newest.
# Optional programs are installed where that is possible; without them, what needs them is left out and says so.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

libraries=current
if [ "${1:-}" = --libraries ]; then
    libraries=$2
    shift 2
fi

# Program → the Debian package that holds it.
debian_package() {
    case "$1" in
        dnsmasq) echo dnsmasq-base ;;
        nginx) echo nginx-light ;;
        7z) echo p7zip-full ;;
        ip | tc) echo iproute2 ;;
        zip | unzip | curl | strace | haproxy) echo "$1" ;;
        *) echo "$1" ;;
    esac
}

find_python() {
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

is_there() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

apt_updated=
apt_install() {
    if [ -z "$apt_updated" ]; then
        DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2
        apt_updated=yes
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

missing=
for program in "$@"; do
    if [ "$program" = --optional ]; then
        can_apt || break
    elif ! is_there "$program"; then
        missing="$missing $(debian_package "$program")"
    fi
done
if [ -n "$missing" ]; then
    if can_apt; then
        say "installing:$missing"
        # shellcheck disable=SC2086 - a list of package names
        apt_install $missing
    else
        say "missing programs; install these packages and start again:$missing"
        say "  for example: sudo apt-get install$missing"
        exit 1
    fi
fi

python=$(find_python)
if [ -z "$python" ] && can_apt; then
    apt_install python3 python3-venv
    python=$(find_python)
fi
if [ -z "$python" ]; then
    say "missing: Python 3.11 or newer with venv (Debian: python3 python3-venv)"
    exit 1
fi

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

# What stands in the lock, each file held to its hash. Nothing is fetched for a build: what builds is locked as well.
install_locked() {
    if [ ! -x "$venv/bin/python" ] || ! cmp -s "$lock/libraries.txt" "$venv/.libraries.txt"; then
        say "installing what $lock names into $venv"
        "$python" -m venv --clear "$venv"
        pip install --require-hashes --only-binary :all: -r "$lock/build.txt"
        pip install --require-hashes --no-build-isolation -r "$lock/libraries.txt"
        cp "$lock/libraries.txt" "$venv/.libraries.txt"
    fi
    if [ ! -x "$venv/bin/waystation" ] || ! cmp -s pyproject.toml "$venv/.pyproject.toml"; then
        say "installing Waystation into $venv"
        pip install --no-deps --no-build-isolation --editable .
        cp pyproject.toml "$venv/.pyproject.toml"
    fi
}

# What was released up to this minute: each time anew.
install_newest() {
    say "installing the newest of everything into $venv"
    "$python" -m venv --clear "$venv"
    pip install --upgrade pip
    pip install --editable '.[orchestrator,bench]' --group dev
}

case "$libraries" in
    current) venv=.venv lock=deploy/locks/current install_locked ;;
    oldest) venv=.venv-oldest lock=deploy/locks/oldest install_locked ;;
    newest) venv=.venv-newest install_newest ;;
esac
