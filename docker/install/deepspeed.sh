#!/bin/sh
# DeepSpeed again, with the extensions built that offloading uses: else each is compiled at its first use, on every node.
#   deepspeed.sh VENV CHECKOUT      DEEPSPEED_OPS: names of DS_BUILD_* variables, TORCH_CUDA_ARCH_LIST and MAX_JOBS as environment
set -eu

venv=${1:?the directory of the virtual environment}
checkout=${2:?the directory of the checkout, for the pinned version}
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;8.6;8.9;9.0;10.0;12.0+PTX}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export PATH="$venv/bin:$PATH" # ninja, without which one file is compiled after the other
# libaio's headers are needed to build, its library to run.
if ! [ -f /usr/include/libaio.h ]; then
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libaio-dev
    rm -rf /var/lib/apt/lists/*
fi
for op in ${DEEPSPEED_OPS:-FUSED_ADAM CPU_ADAM UTILS AIO}; do
    export "DS_BUILD_$op=1"
done
"$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall \
    --no-binary deepspeed -c "$checkout/constraints.txt" deepspeed
"$venv/bin/python" -c 'from deepspeed.git_version_info import installed_ops as ops; print("built:", sorted(o for o in ops if ops[o]))'
