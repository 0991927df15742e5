#!/usr/bin/env bash
# gpu_campaign.sh [minutes] [--dry] [--stages 1,3,5]
#
# Everything that a GPU can tell about this project, in so many minutes (30); README.md beside this
# file explains it. PYTHON= is the interpreter with torch, OUT= the directory of the results,
# DECONV_EXT_COMMIT= the commit where there is no repository.
set -euo pipefail
[ -z "${OUT:-}" ] || export OUT="$(realpath -m "$OUT")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m campaign "$@"
