#!/usr/bin/env bash
# The Debian packages of the cluster tests. As root. Nothing is started: the tests start every daemon themselves.
set -euo pipefail

packages=(
  munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins
  openssh-server openssh-client pdsh openmpi-bin
  iproute2 nftables iputils-ping util-linux psmisc
  nginx-light curl shellcheck
)

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] \
    || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing for the cluster tests: ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then # the packages' own scripts ask it whether they may start services
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
