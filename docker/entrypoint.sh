#!/bin/sh
# Process of the container: with SIMMIM_SSHD=1 an ssh server is started first, so that a hostfile can name this container.
#   authorized keys: SIMMIM_AUTHORIZED_KEYS (text), or a file mounted at /run/secrets/ssh/authorized_keys
set -eu

if [ "${SIMMIM_SSHD:-0}" = 1 ]; then
    keys="$HOME/.ssh/authorized_keys"
    umask 077
    if [ -n "${SIMMIM_AUTHORIZED_KEYS:-}" ]; then printf '%s\n' "$SIMMIM_AUTHORIZED_KEYS" > "$keys"
    elif [ -r /run/secrets/ssh/authorized_keys ]; then cp /run/secrets/ssh/authorized_keys "$keys"
    elif ! [ -s "$keys" ]; then
        echo "entrypoint: SIMMIM_SSHD=1 but nobody may log in: give SIMMIM_AUTHORIZED_KEYS," \
            "or mount a file at /run/secrets/ssh/authorized_keys." >&2
        exit 2
    fi
    [ -f "$HOME/sshd/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$HOME/sshd/host_key"
    # A session that ssh opens sees nothing of the container's environment; what the ranks need of it is written down for it.
    env | grep -E '^(PATH|LD_LIBRARY_PATH|CUDA_|NVIDIA_|NCCL_|GLOO_|SIMMIM_|VIRTUAL_ENV|HF_|AWS_|TORCH)' | grep -v '^SIMMIM_AUTHORIZED_KEYS=' \
        > "$HOME/.ssh/environment" || true
    /usr/sbin/sshd -f "$HOME/sshd/sshd_config" -E "$HOME/sshd/sshd.log"
fi
exec "$@"
