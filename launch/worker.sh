#!/usr/bin/env bash
# The worker's half of launch/tpu.sh, run in the home folder of every worker of a slice:
#   worker.sh install          an environment with vlm_jax and JAX for TPUs
#   worker.sh start ARGS...    python ARGS... in the background; nothing to do if one is running
#   worker.sh follow LINE      the log from LINE (as in tail -n) to the end; the run's exit code
set -euo pipefail

readonly TREE="$HOME/vlm_jax" ENVIRONMENT="$HOME/vlm_jax_env" RUN="$HOME/vlm_jax_run"

# The images carry an older Python than vlm_jax needs; uv brings one.
install() {
  python3 -m pip install --quiet --user --upgrade uv
  local uv="$HOME/.local/bin/uv"
  [[ -x "$ENVIRONMENT/bin/python" ]] || "$uv" venv --quiet --python 3.12 "$ENVIRONMENT"
  cd "$TREE"
  "$uv" pip install --quiet --python "$ENVIRONMENT" --constraint requirements.txt --editable '.[tpu]'
}

# The lock falls with the processes that hold it, even at a reboot; a process id may be another's.
running() { [[ -f "$RUN/lock" ]] && ! flock --nonblock "$RUN/lock" true; }

start() {
  if running; then
    echo "a run is going on already"
    return
  fi
  mkdir -p "$RUN"
  rm -f "$RUN/code"
  : >"$RUN/log"
  cd "$TREE"
  # A session of its own, so that the run outlives this connection.
  # shellcheck disable=SC2016 # the inner shell expands
  setsid nohup flock --no-fork "$RUN/lock" bash -c '
    code=0
    "$@" >>"$0/log" 2>&1 || code=$?
    echo "$code" >"$0/code"' \
    "$RUN" "$ENVIRONMENT/bin/python" -u "$@" </dev/null >/dev/null 2>&1 &
  echo $! >"$RUN/pid"
  # Return once it holds the lock; it may also have ended already, in whatever way.
  until running || [[ -f "$RUN/code" ]] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
}

follow() {
  if [[ ! -f "$RUN/pid" ]]; then
    echo "nothing was started on this worker" >&2
    exit 69
  fi
  local live=()
  if running; then live=(-f --pid="$(<"$RUN/pid")" --sleep-interval=0.5); fi
  # Host names of a slice end with -w-NUMBER.
  tail -n "$1" "${live[@]}" "$RUN/log" | sed -u "s/^/[worker ${HOSTNAME##*-w-}] /"
  if [[ ! -f "$RUN/code" ]]; then
    echo "[worker ${HOSTNAME##*-w-}] the run was cut off without an exit code" >&2
    exit 75
  fi
  exit "$(<"$RUN/code")"
}

"$@"
