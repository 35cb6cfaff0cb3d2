#!/usr/bin/env bash
# Side environments with the peers that tests and benchmarks compare with, apart from .venv because
# their pins disagree: .baselines/torch (torch, transformers, peft), .baselines/tunix (google-tunix pins an
# older transformers). A test or bench that needs one runs .baselines/NAME/bin/python as a child.
# .baselines/plan holds the TPU compiler alone, for launch/plan.py: inside .venv it would look for TPUs
# at every start of JAX, for 20 seconds. `launch/baselines.sh plan` makes only that.
# RETOOL_PYTHON=/path/to/python3 names the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_env() {  # name, interpreter, requirements…
    local name="$1" python="$2" stamp=".baselines/$1/.ready"
    shift 2
    [ "$(cat "$stamp" 2>/dev/null)" = "$*" ] && return
    printf 'baselines: %s (%s): %s\n' "$name" "$("$python" -V)" "$*"
    rm -rf ".baselines/$name"
    "$python" -m venv ".baselines/$name"
    # pip, not uv: it takes the processor-only build of torch where the machine's own settings offer one.
    ".baselines/$name/bin/python" -m pip install -q --disable-pip-version-check "$@"
    printf '%s' "$*" >"$stamp"
}

compiler='libtpu==0.0.50.*'  # the one that jax[tpu] 0.12.0 pins; setup.py's extra `plan` names the same
if [ "$(uname -s)" = Linux ] && [ "$(cat .baselines/plan/.ready 2>/dev/null)" != "$compiler" ]; then
    echo "baselines: plan: $compiler"
    rm -rf .baselines/plan
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .baselines/plan "$compiler"
    printf '%s' "$compiler" >.baselines/plan/.ready
fi
[ "${1:-}" != plan ] || exit 0

# torch's processor-only builds come for fewer versions of Python than the project runs on.
torch_python="${RETOOL_PYTHON:-}"
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3 "$(type -P python3.11 || true)" .venv/bin/python; do
    [ -n "$torch_python" ] || { "$found" -c 'import venv, ensurepip' >/dev/null 2>&1 && torch_python="$found"; } || true
done
make_env torch "$torch_python" 'torch==2.13.*' 'transformers>=5' safetensors sentencepiece numpy \
    gguf accelerate 'peft==0.21.*'
make_env tunix "${RETOOL_PYTHON:-.venv/bin/python}" 'google-tunix==0.1.7'
echo 'baselines: ready'
