#!/usr/bin/env bash
# First process of a host, in namespaces of its own. It ends, and the host with it, when its standard input does.
# Arguments: the host's name, the folder of the lab.
set -euo pipefail
name=$1 lab=$2

mount --make-rprivate /
umount --recursive --lazy /run/netns 2>/dev/null || true # or this host would keep dead networks of others alive
hostname "$name"

mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd /run/lock /run/cgroup
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs "$lab/local"
if [ -d /sys/fs/cgroup ]; then
  mount --rbind /sys/fs/cgroup /run/cgroup
  mount -t sysfs sysfs /sys # the network devices of this host
  mount --move /run/cgroup /sys/fs/cgroup
fi

cp "$lab/etc/"{hosts,nsswitch.conf,resolv.conf} /run/
echo "$name" >/run/hostname
for file in hosts nsswitch.conf resolv.conf hostname; do
  if [ -e "/etc/$file" ]; then mount --bind "/run/$file" "/etc/$file"; fi
done
mount --bind "$lab/etc/ssh" /etc/ssh
if [ -d "$HOME/.ssh" ]; then mount -t tmpfs -o mode=700 tmpfs "$HOME/.ssh"; fi
if [ -e "$HOME/.bashrc" ]; then mount --bind /dev/null "$HOME/.bashrc"; fi # ssh's shells read it

/usr/sbin/sshd -D -e -f /etc/ssh/sshd_config &
touch /run/ready
cat >/dev/null
