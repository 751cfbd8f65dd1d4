#!/bin/sh
# The virtual environment with everything that pyproject.toml asks for, in the versions of constraints.txt.
#   python.sh VENV CHECKOUT [EXTRAS]       for example: python.sh /opt/venv /opt/simmim_scale cloud,coco,tensorboard,wandb
set -eu

venv=${1:?the directory of the virtual environment}
checkout=${2:?the directory of the checkout}
extras=${3:-}

[ -f "$checkout/pyproject.toml" ] || { echo "python.sh: no pyproject.toml in $checkout: give the directory of the checkout." >&2; exit 2; }
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check \
    -c "$checkout/constraints.txt" ninja packaging setuptools wheel
"$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check \
    -c "$checkout/constraints.txt" -e "$checkout${extras:+[$extras]}"
"$venv/bin/python" -m pip check
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "for CUDA", torch.version.cuda)'
