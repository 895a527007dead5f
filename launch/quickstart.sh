#!/usr/bin/env bash
# Two teachers and a student distilled from both, on real clips: launch/quickstart.sh [options of `mvd-scale quickstart`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec mvd-scale quickstart "$@"
