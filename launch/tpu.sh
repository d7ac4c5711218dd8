#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, copies this working tree, installs, runs on every worker
# and follows the logs. See `launch/tpu.sh --help`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly WORKER="bash vlm_jax/launch/worker.sh" # as the workers see it

usage() {
  cat <<'USAGE'
usage: launch/tpu.sh [VERB] --name=NAME --type=TYPE --config=FILE --workdir=DIR [options] [-- FLAGS]

verbs
  launch     up, copy, install, run, and follow the logs (the default)
  up         create the slice, or find it, and wait until it is active
  run        copy, install, run and follow on a slice that is up
  logs       follow the run of a slice again
  down       delete the slice
  all        launch, then down, whatever the run's exit code

options
  --name=NAME         name of the slice (letters, digits, dashes)
  --type=TYPE         accelerator type: v4-8, v5litepod-16, v5p-32, v6e-64, ...
  --zone=ZONE         zone; by default one that has the type's generation
  --project=PROJECT   project; by default gcloud's own
  --runtime=VERSION   software version; by default the generation's
  --spot              cheaper capacity that may be taken back at any time
  --config=FILE       configs/NAME.py, with an optional :variant
  --workdir=DIR       folder of the run; on a mounted bucket it outlives the slice
  --poll=SECONDS      first pause between two looks at the slice (default 10); doubles up to 8 times it
  --dry-run           print the exact commands and do nothing
  FLAGS               given to vlm_jax.main as they are: --config.train.steps=100

exit code: that of the run (0 done, 65 and 78 stop and read, 70 and 75 run the same command again),
75 where the slice was taken back, 64 for a wrong command line, otherwise gcloud's own.
USAGE
}

# generation  prefix of the type  runtime version      default zone (types and zones: TPU documentation)
readonly GENERATIONS="\
v4   v4         tpu-ubuntu2204-base  us-central2-b
v5e  v5litepod  v2-alpha-tpuv5-lite  us-west4-a
v5p  v5p        v2-alpha-tpuv5       us-east5-a
v6e  v6e        v2-alpha-tpuv6e      us-east5-b"

say() { printf '[tpu] %s\n' "$*" >&2; }
fail() { # fail CODE MESSAGE...
  local code="$1"
  shift
  say "$@"
  exit "$code"
}

# One line that a shell reads back as exactly these arguments.
quote() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="${word@Q}"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if ((dry_run)); then quote "$@"; else "$@"; fi
}

# Runs a command again while ssh cannot connect (255): a new slice takes a while to know the keys.
run_patiently() {
  local code pause="$poll" tries=5
  while ((tries-- > 0)); do
    code=0
    run "$@" || code=$?
    ((code == 255)) || return "$code"
    say "no connection (exit code 255), $tries more tries"
    ((tries == 0)) || sleep "$pause"
    pause=$((pause * 2))
  done
  return "$code"
}

queued() { # queued VERB [FLAGS...]
  local verb="$1"
  shift
  quote gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

on_workers() { # on_workers COMMAND
  run_patiently gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# Prints the state of the slice, ABSENT if there is none; fails as gcloud does.
state() {
  local answer errors code=0
  errors="$(mktemp)"
  answer="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    '--format=value(state.state)' 2>"$errors")" || code=$?
  if ((code == 0)); then
    printf '%s\n' "$answer"
  elif grep -q NOT_FOUND "$errors"; then
    code=0
    echo ABSENT
  else
    cat "$errors" >&2
  fi
  rm -f "$errors"
  return "$code"
}

create() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  ((spot)) && flags+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${flags[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Waits until the slice is active, looking less and less often.
wait_until_active() {
  local now last="" pause="$poll" lost=0
  while true; do
    if now="$(state)"; then
      lost=0
    elif ((++lost < 5)); then
      now="unknown"
    else
      fail 69 "gcloud could not describe $name five times in a row; see its message above"
    fi
    [[ "$now" == "$last" ]] || say "$name is $now"
    last="$now"
    case "$now" in
      ACTIVE) return ;;
      FAILED) fail 70 "$name failed to start (quota, capacity or type); for the reason:" \
        "$(queued describe)" ;;
      SUSPENDED | SUSPENDING) fail 75 "$name was taken back; run the same command again" ;;
      ABSENT) fail 75 "$name was deleted while waiting for it; run the same command again" ;;
    esac
    sleep "$pause"
    pause=$((pause * 2 > poll * 8 ? poll * 8 : pause * 2))
  done
}

up() {
  if ((dry_run)); then
    queued describe '--format=value(state.state)'
    create
    return
  fi
  local now
  now="$(state)"
  case "$now" in
    ACTIVE) say "$name is up" && return ;;
    SUSPENDED | FAILED)
      # Neither state is ever left again: the request must go before its name is free.
      say "$name is $now: deleting it and asking anew"
      delete
      create
      ;;
    ABSENT) create ;;
    *) say "$name was asked for already" ;;
  esac
  wait_until_active
}

# The files git knows or would know: uncommitted work included, ignored files left out.
copy() {
  local archive pack
  archive=/tmp/vlm_jax.tgz
  ((dry_run)) || archive="$(mktemp -d)/vlm_jax.tgz"
  # ls drops the files that are deleted but not yet committed, over which tar would stumble.
  pack="cd $(quote "$ROOT") && git ls-files -z --cached --others --exclude-standard"
  pack+=" | xargs -0 ls -d 2>/dev/null | tar -czf $(quote "$archive") -T -"
  if ((dry_run)); then printf '(%s)\n' "$pack"; else bash -c "$pack"; fi
  run_patiently gcloud compute tpus tpu-vm scp "$archive" "$name:vlm_jax.tgz" "${where[@]}" --worker=all
  ((dry_run)) || rm -rf "$(dirname "$archive")"
  on_workers "mkdir -p vlm_jax && tar -xzf vlm_jax.tgz -C vlm_jax"
}

start() {
  local train
  train="$(quote -m vlm_jax.main --config="$config" --workdir="$workdir" "${flags[@]}")"
  say "unless it is on a mounted bucket, $workdir goes with the slice"
  on_workers "$WORKER start $train"
}

# Follows the run to its end, through lost connections; ends with the run's exit code.
follow() {
  local code now lines=+1 lost=0
  while true; do
    code=0
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
      --command="$WORKER follow $lines" || code=$?
    ((code != 0 && !dry_run)) || return 0
    now="$(state)" || now="unknown"
    case "$now" in
      SUSPENDED | SUSPENDING | FAILED | ABSENT) fail 75 "$name is $now: it was taken back during" \
        "the run; run the same command again" ;;
    esac
    ((code == 255)) || fail "$code" "the run ended with exit code $code"
    ((++lost < 10)) || fail 255 "the connection to $name was lost ten times"
    say "the connection was lost; the run goes on, following again"
    lines=20
    sleep "$poll"
  done
}

run_job() {
  copy
  on_workers "$WORKER install"
  start
  follow
}

down() {
  local now
  if ((dry_run)); then
    delete
    return
  fi
  now="$(state)"
  if [[ "$now" == ABSENT ]]; then
    say "$name is not there: nothing to delete"
    return
  fi
  delete
  now="$(state)"
  [[ "$now" == ABSENT ]] || fail 70 "$name is still $now and may be billed; run down again"
  say "$name is deleted"
}

# Sets type, runtime and zone from the table of generations.
resolve_type() {
  local prefix version zones
  case "$type" in
    tpu7x* | v7x* | TPU7x*) fail 64 "--type=$type: the Cloud TPU API, which this script uses, does" \
      "not support TPU7x; such slices come from Compute Engine or GKE" ;;
    v5e-*) type="v5litepod-${type#v5e-}" ;;
  esac
  while read -r _ prefix version zones; do
    [[ "$type" =~ ^"$prefix"-[0-9]+$ ]] || continue
    : "${runtime:=$version}" "${zone:=$zones}"
    return
  done <<<"$GENERATIONS"
  fail 64 "--type=${type:-(none)}: expected v4-N, v5litepod-N (or v5e-N), v5p-N or v6e-N"
}

parse() {
  while (($#)); do
    case "$1" in
      launch | up | run | logs | down | all)
        [[ -z "$verb" ]] || fail 64 "two verbs: $verb and $1"
        verb="$1"
        ;;
      --name=*) name="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --runtime=*) runtime="${1#*=}" ;;
      --config=*) config="${1#*=}" ;;
      --workdir=*) workdir="${1#*=}" ;;
      --poll=*) poll="${1#*=}" ;;
      --spot) spot=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help) usage && exit 0 ;;
      --)
        shift
        flags=("$@")
        return
        ;;
      *) fail 64 "unknown argument $(quote "$1"); see launch/tpu.sh --help" ;;
    esac
    shift
  done
}

check() {
  verb="${verb:-launch}"
  [[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail 64 "--name=$name: expected small letters, digits and dashes, a letter first"
  [[ "$poll" =~ ^[0-9]+$ ]] || fail 64 "--poll=$poll: expected whole seconds"
  if [[ "$verb" =~ ^(launch|up|all)$ || -z "$zone" ]]; then resolve_type; fi
  if [[ "$verb" =~ ^(launch|run|all)$ ]]; then
    [[ "$config" != /* && -f "$ROOT/${config%%:*}" ]] ||
      fail 64 "--config=${config:-(none)}: expected a file of this working tree, like configs/tiny.py"
    [[ -n "$workdir" ]] || fail 64 "--workdir is missing: the folder of the run"
    [[ "$workdir" != *://* ]] || fail 64 "--workdir=$workdir is a URL: name a mounted bucket's folder"
  fi
  ((dry_run)) || command -v gcloud >/dev/null ||
    fail 69 "gcloud was not found: install the Google Cloud CLI, or use --dry-run"
  where=(--zone="$zone")
  if [[ -n "$project" ]]; then where+=(--project="$project"); fi
}

((BASH_VERSINFO[0] >= 5)) || fail 69 "bash $BASH_VERSION is too old: expected 5 or newer"
verb="" name="" type="" zone="" project="" runtime="" config="" workdir="" poll=10 spot=0 dry_run=0
flags=()
parse "$@"
check
interrupted() {
  say "left $name as it is; it may be billed. Follow or delete it with:" \
    "launch/tpu.sh logs|down $(quote --name="$name" "${where[@]}")"
  exit 130
}

# `all` leaves nothing behind, however it ends, and still tells how the run ended.
clean_up() {
  local code=$?
  trap - EXIT
  down
  exit "$code"
}

if [[ "$verb" == all ]]; then trap clean_up EXIT; else trap interrupted INT; fi
case "$verb" in
  launch | all)
    up
    run_job
    ;;
  up) up ;;
  run) run_job ;;
  logs) follow ;;
  down) down ;;
esac
