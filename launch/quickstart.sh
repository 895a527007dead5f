#!/usr/bin/env bash
# Train two teachers on real clips and distil a student from both: launch/quickstart.sh [options of `mvd-scale quickstart`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec mvd-scale quickstart "$@"
