# Sourced by the scripts of this folder: creates .venv at the first start, and puts it first on PATH.
#
#   MVD_PYTHON   Python interpreter to use (3.11 to 3.13); the first one found if not set
#
# With mvd_oldest set, .venv-oldest takes its place, with the oldest release of each requirement in pyproject.toml.
#
# .venv/stamp is written last and identifies what was installed, so that the next start repairs an interrupted one.
# shellcheck shell=bash

mvd_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mvd_venv="$mvd_root/.venv${mvd_oldest:+-oldest}"
mvd_minutes=5
mvd_gigabytes=7
mvd_gigabytes_free=12

mvd_fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints a hash of the requirements and of the repository's path, which the scripts in .venv contain.
mvd_wanted() {
    { echo "$mvd_root"; cat "$mvd_root/pyproject.toml"; } | sha256sum
}

# Prints constraints for pip: the lower bound of each requirement, such as numpy==1.26, if these are asked for.
mvd_constraints() {
    local requirement
    [[ -n "${mvd_oldest:-}" ]] || return 0
    grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' "$mvd_root/pyproject.toml" | while IFS= read -r requirement; do
        requirement="${requirement#\"}"
        echo "${requirement/>=/==}"
    done
}

mvd_find_python() {
    local name version found=""
    local names=(python3.11 python3.12 python3.13 python3 python)
    [[ -z "${MVD_PYTHON:-}" ]] || names=("$MVD_PYTHON")
    for name in "${names[@]}"; do
        version="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        case "$version" in
            3.11 | 3.12 | 3.13)
                echo "$name"
                return
                ;;
        esac
        found+="${found:+, }$name is $version"
    done
    found="${found:-${MVD_PYTHON:-python3} does not run}"
    mvd_fail "no Python 3.11 to 3.13 found ($found):" \
        "install one, or set MVD_PYTHON to the path of one, as in MVD_PYTHON=/path/to/python3.11"
}

mvd_explain_failure() {
    local log="$mvd_venv/install.log" reason
    if grep -qE 'Name or service not known|name resolution|NewConnectionError|ConnectTimeout|Network is unreachable|ProxyError' "$log"; then
        mvd_fail "pip cannot reach its package index: connect this machine to the network, or set PIP_INDEX_URL to an" \
            "index that it can reach, and start again (full output: $log)"
    fi
    if grep -q 'No space left on device' "$log"; then
        mvd_fail "the disk became full while installing $mvd_gigabytes GB: free some space (pip unpacks in" \
            "${TMPDIR:-/tmp}) and start again (full output: $log)"
    fi
    reason="$(grep -v '^ *$' "$log" | tail -n 5)"
    mvd_fail "pip could not install the project; fix the following and start again (full output: $log):"$'\n'"$reason"
}

mvd_install() {
    local wanted="$1" python free
    python="$(mvd_find_python)" || exit 1
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        mvd_fail "$python has no venv module: install it (Debian and Ubuntu: apt install python3-venv) and start again"
    free="$(df -Pk "$mvd_root" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')"
    ((free >= mvd_gigabytes_free)) ||
        mvd_fail "$free GB are free in $mvd_root, but the installation needs $mvd_gigabytes_free GB: free some space and start again"

    echo "Installing (about $mvd_minutes minutes, $mvd_gigabytes GB) into $mvd_venv ..." >&2
    # An incomplete environment is deleted, not repaired: pip's cache keeps what was downloaded.
    [[ -f "$mvd_venv/stamp" ]] || rm -rf "$mvd_venv"
    rm -f "$mvd_venv/stamp"
    mkdir -p "$mvd_venv"
    mvd_constraints >"$mvd_venv/constraints.txt"
    {
        "$python" -m venv "$mvd_venv" &&
            # pip 23 and newer install editable projects that have no setup.py.
            "$mvd_venv/bin/python" -m pip install --disable-pip-version-check 'pip>=23' &&
            "$mvd_venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
                --constraint "$mvd_venv/constraints.txt" --editable "${mvd_root}[samples,dev]"
    } >"$mvd_venv/install.log" 2>&1 || mvd_explain_failure
    echo "$wanted" >"$mvd_venv/stamp"
    echo "Installed." >&2
}

mvd_set_up() {
    local wanted
    # pip writes the path into programs that a shell starts, and PATH is split at colons.
    [[ ! "$mvd_root" =~ [^[:alnum:]\ @+=,./_-] ]] ||
        mvd_fail "the repository is at $mvd_root, and shells would interpret some characters of this path:" \
            "move it to a path of letters, digits, spaces and @+=,./-_"
    wanted="$(mvd_wanted)"
    [[ -x "$mvd_venv/bin/python" && "$(cat "$mvd_venv/stamp" 2>/dev/null)" == "$wanted" ]] && return
    # A lock, because two first starts at the same time would install into the same folder.
    (
        flock 9
        [[ "$(cat "$mvd_venv/stamp" 2>/dev/null)" == "$wanted" ]] || mvd_install "$wanted"
    ) 9>"$mvd_venv.lock" || exit 1
}

# Runs a launcher in place of this script. The guard passes SIGTERM, SIGINT and SIGUSR1 to the ranks, and ends after them.
mvd_launch() {
    exec python "$mvd_root/mvd_scale/distributed/launch_guard.py" "$@"
}

mvd_set_up
export VIRTUAL_ENV="$mvd_venv"
export PATH="$mvd_venv/bin:$PATH"
