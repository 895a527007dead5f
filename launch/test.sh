#!/usr/bin/env bash
# Run all checks, the fast ones first; with arguments, run pytest with them: launch/test.sh tests/unit -k mask
#
#   --gpu      run the self-test of a machine with a GPU (all of it, 15 to 30 minutes by estimate; launch/gpu_bringup.sh
#              takes 10), and write gpu_report.md, to be pasted into an issue; further arguments go to pytest
#   --extended run the further variants of slow tests only, 10 to 15 minutes by estimate; further arguments go to pytest
#   --oldest   run the quick tests, or pytest with further arguments, with the oldest release of each requirement that
#              pyproject.toml admits, in .venv-oldest; MVD_PYTHON=python3.11 for the oldest Python too
set -euo pipefail
if [[ "${1:-}" == --oldest ]]; then
    shift
    mvd_oldest=1
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$mvd_root"

if [[ "${1:-}" == --gpu ]]; then
    shift
    echo "The self-test takes 15 to 30 minutes by estimate; gpu_report.md says how long it took." >&2
    exec pytest tests/gpu -m gpu --gpu-report gpu_report.md "$@"
fi
if [[ "${1:-}" == --extended ]]; then
    shift
    exec pytest -m extended "$@"
fi
if (($#)); then
    exec pytest "$@"
fi

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}
# Most tests keep one core busy most of the time. Those of one file share what they start, so they stay together.
cores="$(nproc)"
# Threads that wait give their core to the other tests at once.
export OMP_WAIT_POLICY=passive
parallel=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)
quick="not slow and not serial and not gpu"
if [[ -n "${mvd_oldest:-}" ]]; then
    exec pytest "${parallel[@]}" -m "$quick"
fi
check ruff check .
check ruff format --check .
check mypy
check pytest "${parallel[@]}" -m "$quick"
check pytest "${parallel[@]}" -m "slow and not extended and not serial and not gpu"
check pytest -m "serial or gpu"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
