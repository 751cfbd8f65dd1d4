#!/bin/sh
# NVIDIA Apex with its fused LayerNorm and fused Adam, at a pinned commit. Needs nvcc of the CUDA version that torch was built for.
#   apex.sh VENV [SOURCE]      SOURCE: a git URL or a local clone; APEX_COMMIT, TORCH_CUDA_ARCH_LIST and MAX_JOBS as environment
# The package called "apex" on PyPI is something else: it is never installed here, and is removed where somebody did.
set -eu

venv=${1:?the directory of the virtual environment}
source=${2:-https://github.com/NVIDIA/apex.git}
commit=${APEX_COMMIT:-6424da3b4faa6c8f062da4a48c424fff3f02d42d}
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;8.6;8.9;9.0;10.0;12.0+PTX}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export PATH="$venv/bin:$PATH" # ninja, without which one file is compiled after the other
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:---threads 2}"

if [ -z "${CUDA_HOME:-}" ]; then
    # A distribution may put a wrapper of nvcc into PATH, so the usual place is looked at first.
    for nvcc in /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
        if [ -x "$nvcc" ]; then CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")"); break; fi
    done
fi
[ -n "${CUDA_HOME:-}" ] || { echo "apex.sh: no nvcc found. Use a CUDA image with 'devel' in its name, or set CUDA_HOME." >&2; exit 2; }
export CUDA_HOME
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git init -q "$folder"
git -C "$folder" fetch -q --depth 1 "$source" "$commit"
git -C "$folder" checkout -q FETCH_HEAD
"$venv/bin/python" -m pip uninstall -y -q apex 2>/dev/null || true
# torch of this environment, not a newer one: the extensions only load into the torch that they were built with.
"$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps -v "$folder"
cd /
"$venv/bin/python" -c 'import torch, amp_C, fused_layer_norm_cuda; print("apex: fused LayerNorm and Adam load")'
