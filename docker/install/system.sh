#!/bin/sh
# Packages of the operating system that the trainer needs at run time. For Debian 12 and Ubuntu 22.04 / 24.04; as root.
#   gcc, libc6-dev, python3-dev: Triton compiles a launcher for every kernel, DeepSpeed its extensions at the first use
#   libaio1: DeepSpeed's NVMe offload        openssh: nodes of a hostfile        tini: signals and zombies of process 1
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update
# The library of asynchronous I/O has another name since Ubuntu 24.04 (64-bit time).
if apt-cache show libaio1t64 >/dev/null 2>&1; then libaio=libaio1t64; else libaio=libaio1; fi
apt-get install -y --no-install-recommends \
    ca-certificates gcc g++ git "$libaio" libc6-dev make openssh-client openssh-server pdsh procps python3 python3-dev python3-venv tini
rm -rf /var/lib/apt/lists/*
python3 -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this system has {sys.version}"'
