#!/usr/bin/env bash
# Runs every check that needs a GPU, from a checkout and without a network:
#
#     scripts/gpu_session.sh OUT [--rehearse] [more arguments of `python -m eval.gpu_check`]
#
# Wheels in .whl/ (a newer transformers, for example) take precedence over installed packages. Then the check runs, for at
# most eight minutes. Even after a failure, OUT holds the results so far: at most 8 files, each under 16 MB.
# PYTHON is the interpreter, SITE the folder for the wheels, LIMIT_S the seconds after which everything is ended.
set -uo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: scripts/gpu_session.sh OUT [--rehearse] [more arguments of python -m eval.gpu_check]" >&2
    exit 2
fi
out=$1
shift
python=${PYTHON:-python3}
site=${SITE:-${TMPDIR:-/tmp}/gpu-session-site}
limit_s=${LIMIT_S:-540}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
status=1
child=

finish() {
    trap - EXIT INT TERM
    if [ -n "$child" ] && kill -0 "$child" 2>/dev/null; then
        kill -TERM "$child" 2>/dev/null
        wait "$child"
        status=$?
    fi
    # The check prints its table itself. If it was ended earlier, print what it has found so far.
    if [ ! -s "$out/table.md" ] && [ -s "$out/gpu.json" ]; then
        timeout 60 "$python" -m eval.gpu_check.table "$out" && cat "$out/table.md"
    fi
    if [ ! -s "$out/table.md" ] && [ -s "$out/log.txt" ]; then
        tail -n 60 "$out/log.txt"
    fi
    ls -l "$out"
    echo "gpu session: exit status $status after $SECONDS s"
    exit "$status"
}
trap finish EXIT
trap 'status=143; exit 143' INT TERM

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
wheels=(.whl/*.whl)
if [ -e "${wheels[0]}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
        "${wheels[@]}" || exit
    export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
nvidia-smi -L 2>/dev/null
if ! "$python" -m eval.gpu_check.requirements; then
    status=2
    exit
fi
timeout --kill-after=15 "$limit_s" "$python" -m eval.gpu_check --out "$out" "$@" &
child=$!
wait "$child"
status=$?
child=
exit
