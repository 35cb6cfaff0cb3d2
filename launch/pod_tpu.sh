#!/usr/bin/env bash
# A run on every host of a TPU slice of Google Cloud, by gcloud; it outlives the shell that starts it (docs/pods.md).
#   export POD=my-slice ZONE=us-east5-a            # PROJECT and REPO (retool_jax) where they are others
#   launch/pod_tpu.sh up --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot
#                                                  # asks for the slice and waits for it; one that was preempted or has
#                                                  # failed is made again. Flags go to gcloud's queued-resources create
#   launch/pod_tpu.sh push                         # this checkout, as committed, to every host
#   launch/pod_tpu.sh each 'make setup EXTRA=tpu'  # a command in each one's checkout
#   launch/pod_tpu.sh start launch/ppo.py --config=configs/ppo.py:qwen2_5_7b …
#   launch/pod_tpu.sh status | logs [WORKER [options of tail]] | stop | wait
#   launch/pod_tpu.sh down                         # gives the slice back: until then it costs
# `start` gives the run RETOOL_SANDBOX_TOKEN, HF_TOKEN and the like from this shell, in a file that its user alone can
# read. `stop` is SIGTERM: the step that is whole is saved, and the same `start` goes on. `wait` returns when the run
# has ended everywhere: 0 all is done, 2 an error that its log names, 75 it was stopped or the slice is gone.
set -euo pipefail
verb="${1:-}"
[ $# -eq 0 ] || shift
say() { printf 'pod_tpu.sh: %s\n' "$*"; }
die() { say "$*" >&2; exit 2; }
[ -n "${POD:-}" ] && [ -n "${ZONE:-}" ] || die 'POD and ZONE: name the slice and its zone'
repo="${REPO:-retool_jax}"
poll_s="${POLL_S:-30}"
# Variables that a run gets where they are set here; further ones, host by host, are the hosts' own.
passed=(RETOOL_COORDINATOR RETOOL_SANDBOX_TOKEN JAX_COMPILATION_CACHE_DIR HF_TOKEN XLA_FLAGS LIBTPU_INIT_ARGS)

tpus() { gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
on() { tpus tpu-vm ssh "$POD" --worker="$1" --command="$2"; }
worker() { on "$1" "cd $repo && bash launch/pod_worker.sh$(shift; [ $# -eq 0 ] || printf ' %q' "$@")"; }
# Lists, not descriptions: what is missing is an empty line, and any other failure ends this script.
queued() { tpus queued-resources list --filter="name~/$POD\$" --format='value(state.state)'; }
node() { tpus tpu-vm list --filter="name~/$POD\$" --format='value(state)'; }

remove() { tpus queued-resources delete "$POD" --force --quiet; }

up() {
    local state told='' made=''
    [ $# -gt 0 ] || die 'up: --accelerator-type=… --runtime-version=…, --spot if it may be taken away'
    while :; do
        state="$(queued)"
        [ "$state" != ACTIVE ] || state="ACTIVE $(node)"
        [ "$state" = "$told" ] || say "$POD is ${state:-not there}"
        told="$state"
        case "$state" in
            'ACTIVE READY') return ;;
            '')
                tpus queued-resources create "$POD" --node-id="$POD" "$@"
                made=1 ;;
            FAILED)
                [ -z "$made" ] || die "refused; why says: gcloud compute tpus queued-resources describe $POD"
                remove ;;
            SUSPENDED|'ACTIVE PREEMPTED'|'ACTIVE TERMINATED'|'ACTIVE ') remove ;;
            *) sleep "$poll_s" ;;
        esac
    done
}

push() {
    local packed
    packed="$(mktemp)"
    trap "rm -f '$packed'" EXIT
    git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz HEAD >"$packed"
    on all 'install -d -m 700 "$HOME/.retool"'
    tpus tpu-vm scp --worker=all "$packed" "$POD:.retool/checkout.tar.gz"
    on all "mkdir -p $repo && tar -xzf \"\$HOME/.retool/checkout.tar.gz\" -C $repo"
}

start() {
    local name file
    [ $# -gt 0 ] || die 'start: which binary? launch/sft.py --config=…'
    file="$(mktemp)"  # for this user alone
    trap "rm -f '$file'" EXIT
    printf '%s\n' "RETOOL_PROCESSES=${RETOOL_PROCESSES:-auto}" "RETOOL_GRACE_S=${RETOOL_GRACE_S:-300}" >"$file"
    for name in "${passed[@]}"; do
        case "${!name:-}" in
            '') ;;
            *$'\n'*) die "$name has more than one line" ;;
            *) printf '%s=%s\n' "$name" "${!name}" >>"$file" ;;
        esac
    done
    on all 'install -d -m 700 "$HOME/.retool" && rm -f "$HOME/.retool/environment"'
    tpus tpu-vm scp --worker=all "$file" "$POD:.retool/environment"
    worker all start "$@"
}

wait_for_end() {
    local lines state failed=0
    while sleep "$poll_s"; do
        if ! state="$(node)"; then  # for a while at most: gcloud says why
            failed=$((failed + 1))
            [ "$failed" -lt 20 ] || exit 1
            continue
        fi
        failed=0
        [ "$state" = READY ] || { say "$POD is gone"; exit 75; }
        lines="$(worker all status)" || continue  # a connection that failed, or a slice on its way out
        grep -q ': runs since' <<<"$lines" || break
    done
    echo "$lines"
    ! grep -q 'exit status [12] ' <<<"$lines" || exit 2
    ! grep -qv 'exit status 0 ' <<<"$lines" || exit 75
}

case "$verb" in
    up|push|start) "$verb" "$@" ;;
    each) on all "cd $repo && $*" ;;
    stop|status) worker all "$verb" ;;
    logs) worker "${1:-all}" logs "${@:2}" ;;
    wait) wait_for_end ;;
    down) remove ;;
    *) die "$verb: expected up, push, each, start, status, logs, stop, wait or down" ;;
esac
