#!/usr/bin/env bash
# All checks, the quick ones first; with arguments, pytest alone with these: launch/test.sh tests/unit -k mask
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$mvd_root"

if (($#)); then
    exec pytest "$@"
fi

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check mypy
check pytest -m "not slow"
check pytest -m slow

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
