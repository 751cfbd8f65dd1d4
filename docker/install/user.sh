#!/bin/sh
# The user that trains, and an ssh server that only this user needs: host keys and configuration belong to it, so the container
# never runs as root. As root, at build time.
#   user.sh NAME UID PORT
set -eu

name=${1:-simmim}
uid=${2:-1000}
port=${3:-2222}

# Ubuntu's images bring a user of their own with the usual number.
other=$(getent passwd "$uid" | cut -d: -f1)
if [ -n "$other" ] && [ "$other" != "$name" ]; then userdel -r "$other" 2>/dev/null || userdel "$other"; fi
id "$name" >/dev/null 2>&1 || useradd --create-home --uid "$uid" --shell /bin/bash "$name"
home=$(getent passwd "$name" | cut -d: -f6)

install -d -m 700 -o "$name" -g "$name" "$home/.ssh" "$home/sshd"
cat > "$home/sshd/sshd_config" <<CONFIG
# An ssh server for one user, without root: by key only, no passwords, no forwarding. Keys are made when a container starts.
Port $port
HostKey $home/sshd/host_key
PidFile $home/sshd/sshd.pid
AuthorizedKeysFile $home/.ssh/authorized_keys
AllowUsers $name
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
AllowTcpForwarding no
X11Forwarding no
# The entry point writes the container's environment to a file of this user, which sessions read.
PermitUserEnvironment yes
AcceptEnv LANG LC_* NCCL_* GLOO_* SIMMIM_* DS_* OMP_NUM_THREADS
PrintMotd no
Subsystem sftp internal-sftp
CONFIG
cat > "$home/.ssh/config" <<CONFIG
# The nodes of one job: they were made a moment ago, so nobody has seen their keys before.
Host *
    Port $port
    StrictHostKeyChecking accept-new
    IdentityFile $home/.ssh/id_ed25519
    IdentityFile /run/secrets/ssh/id_ed25519
    ServerAliveInterval 10
    ServerAliveCountMax 3
CONFIG
chown -R "$name:$name" "$home/.ssh" "$home/sshd"
chmod 600 "$home/.ssh/config" "$home/sshd/sshd_config"
# Where sshd separates privileges when it is started by root, in test hosts for instance.
install -d -m 755 /run/sshd
for folder in /data /runs; do install -d -o "$name" -g "$name" "$folder"; done
