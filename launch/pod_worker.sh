#!/usr/bin/env bash
# Keeps one of this project's commands running on this machine, whatever becomes of the shell that started it.
# launch/pod_tpu.sh calls it on every worker of a slice:
#   pod_worker.sh start launch/ppo.py --config=…
#   pod_worker.sh stop | status | logs [options of tail]
# Where systemd runs, `start` makes a transient unit of the system (retool.service; root, or sudo without a password),
# with control groups of its own for the sandbox. Elsewhere, and with SYSTEMD=no, it makes a session of its own.
# What it keeps is in ~/.retool, for this user alone: environment (lines NAME=value), arguments, pid, status, log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 077
home="$HOME/.retool"
say() { printf '%s: %s\n' "$HOSTNAME" "$*"; }
die() { say "$*" >&2; exit 1; }

read_environment() {
    local line
    [ -f "$home/environment" ] || return 0
    while IFS= read -r line; do [ -z "$line" ] || export "${line?}"; done <"$home/environment"
}

alive() {  # the number of a process that has ended may be another one's by now
    [ -s "$home/pid" ] && [[ "$(tr '\0' ' ' 2>/dev/null <"/proc/$(<"$home/pid")/cmdline")" == *'pod_worker.sh run ' ]]
}

run() {  # what the unit, or the session, consists of
    local arguments status told=0 child=''
    exec >>"$home/log" 2>&1 </dev/null
    trap 'told=1; [ -z "$child" ] || kill -TERM "$child" || true' TERM
    echo "$$" >"$home/pid"
    mapfile -d '' -t arguments <"$home/arguments"
    read_environment
    export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$home/compiled}"
    echo "== $(date -u +%FT%TZ) started: ${arguments[*]}"
    .venv/bin/python "${arguments[@]}" &
    child=$!
    [ "$told" = 0 ] || kill -TERM "$child" || true
    while :; do  # a signal ends `wait` before the child has ended
        told=0 status=0
        wait "$child" || status=$?
        [ "$told" = 1 ] || break
    done
    echo "== $(date -u +%FT%TZ) ended with exit status $status"
    echo "$status" >"$home/status"
    exit "$status"
}

start() {
    local root=() grace
    [ $# -gt 0 ] || die 'start what? launch/ppo.py --config=…'
    ! alive || die 'a run is going on already; stop it first'
    [ -f "$1" ] || die "no file $1 in $PWD"
    [ -x .venv/bin/python ] || die "no .venv in $PWD; run: make setup EXTRA=tpu"
    install -d -m 700 "$home"
    printf '%s\0' "$@" >"$home/arguments"
    touch "$home/environment"
    chmod 600 "$home/environment"
    rm -f "$home/status" "$home/pid"
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    if [ "${SYSTEMD:-}" != no ] && [ -d /run/systemd/system ] && "${root[@]}" true 2>/dev/null; then
        grace="$(read_environment; echo "${RETOOL_GRACE_S:-30}")"
        # SIGTERM to the first process alone: a sandbox that is told too would answer calls no more.
        "${root[@]}" systemd-run --quiet --collect --unit=retool --uid="$(id -un)" --working-directory="$PWD" \
            --property=KillMode=mixed --property=TimeoutStopSec="$((${grace%.*} + 15))" --property=Delegate=yes \
            --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 bash launch/pod_worker.sh run
    else
        setsid nohup bash launch/pod_worker.sh run >/dev/null 2>&1 </dev/null &
    fi
    for _ in {1..100}; do
        [ ! -s "$home/status" ] && ! alive || break
        sleep 0.1
    done
    [ -s "$home/status" ] || alive || die 'did not start'
    status
}

stop() {  # SIGTERM, and SIGKILL for what is left after the grace
    local pid grace
    if alive; then
        pid="$(<"$home/pid")"
        grace="$(read_environment; echo "${RETOOL_GRACE_S:-30}")"
        kill -TERM "$pid" 2>/dev/null || true  # it may have ended just now
        for ((i = 0; i < (${grace%.*} + 15) * 5; i++)); do
            alive || break
            sleep 0.2
        done
        if alive; then
            say 'has not ended within its grace: killed'
            kill -KILL -- "-$pid" 2>/dev/null || true
            for _ in {1..50}; do alive || break; sleep 0.1; done
        fi
    fi
    status
}

status() {
    if alive; then
        say "runs since $(date -u -r "$home/arguments" +%FT%TZ): $(tr '\0' ' ' <"$home/arguments")"
    elif [ -s "$home/status" ]; then
        say "ended with exit status $(<"$home/status") at $(date -u -r "$home/status" +%FT%TZ)"
    elif [ -s "$home/pid" ]; then
        say 'was killed, or the machine was restarted'
    else
        say 'nothing was started'
    fi
}

logs() {
    [ -f "$home/log" ] || die 'nothing was started'
    [ $# -gt 0 ] || set -- -n 20
    tail "$@" "$home/log" | sed -u "s|^|$HOSTNAME: |"
}

case "${1:-}" in
    start|stop|status|logs|run) "$@" ;;
    *) die "pod_worker.sh ${1:-}: expected start, stop, status or logs" ;;
esac
