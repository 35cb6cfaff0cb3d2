#!/usr/bin/env bash
# A run on every host of a TPU slice of Google Cloud, by gcloud; it outlives the shell that starts it (docs/pods.md).
#   export POD=my-slice ZONE=us-east5-a            # PROJECT and REPO (retool_jax) where they are others
#   launch/pod_tpu.sh up --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot
#                                                  # asks for the slice and waits for it; one that was preempted or has
#                                                  # failed is made again. Flags go to gcloud's queued-resources create
#   launch/pod_tpu.sh push                         # this checkout, as committed, to every host
#   launch/pod_tpu.sh each 'make setup EXTRA=tpu'  # a command in each one's checkout; `first`: in worker 0's alone
#   launch/pod_tpu.sh start launch/ppo.py --config=configs/ppo.py:qwen2_5_7b …
#   launch/pod_tpu.sh status | logs [WORKER] [options of tail] | stop | wait
#   launch/pod_tpu.sh down                         # gives the slice back: until then it costs
# `start` gives the run RETOOL_SANDBOX_TOKEN, HF_TOKEN and the like from this shell, in a file that its user alone can
# read. `stop` is SIGTERM: the step that is whole is saved, and the same `start` goes on. `wait` returns when the run
# has ended everywhere: 0 all is done, 2 an error that its log names, 75 it was stopped or the slice is gone, 1 neither
# gcloud nor the hosts have answered for twenty looks.
set -euo pipefail
verb="${1:-}"
[ $# -eq 0 ] || shift
say() { printf 'pod_tpu.sh: %s\n' "$*"; }
die() { say "$*" >&2; exit 2; }
[ -n "${POD:-}" ] && [ -n "${ZONE:-}" ] || die 'POD and ZONE: name the slice and its zone'
repo="${REPO:-retool_jax}"
poll_s="${POLL_S:-30}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kept='~/.retool'  # there: what a run is given and leaves
# Variables that a run gets where they are set here; further ones, host by host, are the hosts' own.
passed=(RETOOL_COORDINATOR RETOOL_SANDBOX_TOKEN JAX_COMPILATION_CACHE_DIR HF_TOKEN XLA_FLAGS LIBTPU_INIT_ARGS)

tpus() { gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
on() { tpus tpu-vm ssh "$POD" --worker="$1" --command="$2"; }
# The command $2 in the checkout of the worker $1, or of `all`.
inside() { on "$1" "cd $repo 2>/dev/null || { echo \$HOSTNAME: no checkout in $repo: push it first >&2; exit 1; }; $2"; }
worker() { inside "$1" "bash launch/pod_worker.sh$(shift; printf ' %q' "$@")"; }
idle() {  # fails where a run goes on, and names it
    on all "! { [ -f $repo/launch/pod_worker.sh ] && bash $repo/launch/pod_worker.sh status | grep ': runs since' >&2; } || \
{ echo 'a run is going on already; stop it first' >&2; exit 1; }"
}
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
    local packed changed
    changed="$(git -C "$root" status --porcelain | wc -l)"
    [ "$changed" = 0 ] || say "$changed changed files are not committed, and stay here"
    packed="$(mktemp)"
    trap "rm -f '$packed'" EXIT
    git -C "$root" archive --format=tar.gz HEAD >"$packed"
    idle  # a run reads files of its checkout at any time: its sandbox starts from them
    on all "install -d -m 700 $kept && mkdir -p $repo"
    tpus tpu-vm scp --worker=all "$packed" "$POD:.retool/pushed.tar.gz"
    # What the last push brought goes first: a file that was removed here would stay there.
    on all "cd $repo && \
{ [ ! -f $kept/checkout.tar.gz ] || tar -tzf $kept/checkout.tar.gz | grep -v '/\$' | tr '\\n' '\\0' | xargs -0 rm -f; } && \
tar -xzf $kept/pushed.tar.gz && mv $kept/pushed.tar.gz $kept/checkout.tar.gz"
}

start() {
    local name file grace="${RETOOL_GRACE_S:-300}"
    [ $# -gt 0 ] || die 'start: which binary? launch/sft.py --config=…'
    [[ $grace =~ ^[1-9][0-9]*(\.[0-9]+)?$ ]] || die "RETOOL_GRACE_S='$grace': expected seconds"
    file="$(mktemp)"  # for this user alone
    trap "rm -f '$file'" EXIT
    printf '%s\n' "RETOOL_PROCESSES=${RETOOL_PROCESSES:-auto}" "RETOOL_GRACE_S=$grace" >"$file"
    for name in "${passed[@]}"; do
        case "${!name:-}" in
            '') ;;
            *$'\n'*) die "$name has more than one line" ;;
            *) printf '%s=%s\n' "$name" "${!name}" >>"$file" ;;
        esac
    done
    idle  # before anything of a run that goes on is replaced
    on all "install -d -m 700 $kept && rm -f $kept/environment"
    tpus tpu-vm scp --worker=all "$file" "$POD:.retool/environment"
    worker all start "$@"
}

wait_for_end() {
    local lines state failed=0
    while sleep "$poll_s"; do
        # For a while at most, and gcloud says why: an outage, a connection that failed, a slice on its way out.
        [ "$failed" -lt 20 ] || exit 1
        failed=$((failed + 1))
        state="$(node)" || continue
        [ "$state" = READY ] || { say "$POD is gone"; exit 75; }
        lines="$(worker all status)" || continue
        failed=0
        grep -q ': runs since' <<<"$lines" || break
    done
    echo "$lines"
    ! grep -q 'exit status [12] ' <<<"$lines" || exit 2
    ! grep -qv 'exit status 0 ' <<<"$lines" || exit 75
}

case "$verb" in
    up|push|start) "$verb" "$@" ;;
    each|first)
        [ $# -gt 0 ] || die "$verb: which command? 'make setup EXTRA=tpu'"
        inside "$([ "$verb" = each ] && echo all || echo 0)" "$*" ;;
    stop|status) worker all "$verb" ;;
    logs)
        case "${1:-}" in ''|-*) set -- all "$@" ;; esac
        worker "$1" logs "${@:2}" ;;
    wait) wait_for_end ;;
    down) remove ;;
    *) die "$verb: expected up, push, each, first, start, status, logs, stop, wait or down" ;;
esac
