#!/bin/sh
# Writes deploy/locks: which releases are installed, for every system and Python that we name, each file by its hash.
# Usage: deploy/lock.sh [--upgrade]
# A release in `current` stays while pyproject.toml allows it; --upgrade takes the newest of everything.
set -eu
cd "$(dirname "$0")/.."
locks=deploy/locks

# Python is named, since the machine's own is not always the lowest of requires-python. Nothing is built on the way.
compile() {
    file=$locks/$1
    shift
    .venv-lock/bin/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes --no-build \
        --custom-compile-command 'make lock' --output-file "$file" "$@"
}

# What the libraries are built with is installed before them: its releases are those of the whole.
compile_set() {
    set_name=$1
    shift
    compile "$set_name/libraries.txt" --all-extras --group dev --group build pyproject.toml "$@"
    compile "$set_name/build.txt" --group build --constraint "$locks/$set_name/libraries.txt" --upgrade
}

if ! cmp -s "$locks/uv.txt" .venv-lock/.lock; then
    python3 -m venv --clear .venv-lock
    .venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$locks/uv.txt"
    cp "$locks/uv.txt" .venv-lock/.lock
fi

compile_set current "$@"
# The lower bounds themselves are meant, so that nothing of the former file may stay.
compile_set oldest --resolution lowest-direct --upgrade
compile uv.txt --group lock "$@"
