# Sourced by demo.sh and test.sh: makes .venv beside this file, installs what is missing, and activates it.
step() { printf '\n== %s ==\n' "$*"; }

install() {
    local wanted=("$@") stamp="$root/.venv/.installed-$(basename "${!#}" .txt)"
    if [ -f "$stamp" ] && [ -z "$(find "${wanted[@]}" "$root/constraints.txt" -newer "$stamp")" ]; then return; fi
    step "Installing $(basename "${!#}")"
    local files=()
    for file in "${wanted[@]}"; do files+=(-r "$file"); done
    pip install -q -c "$root/constraints.txt" "${files[@]}"
    touch "$stamp"
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed (PYTHON=... names one)" >&2; exit 2; }
[ -f "$root/.venv/bin/activate" ] || "$python" -m venv "$root/.venv"
source "$root/.venv/bin/activate"
if ! python -c 'import torch' 2>/dev/null; then
    step "Installing PyTorch"
    torch=$(grep '^torch==' "$root/constraints.txt")
    # Without an NVIDIA GPU the CPU build is enough, and gigabytes smaller; not every package index offers it.
    if command -v nvidia-smi >/dev/null || ! pip install -q "$torch+cpu" 2>/dev/null; then
        pip install -q "$torch"
    fi
fi
install "$root/requirements.txt"
