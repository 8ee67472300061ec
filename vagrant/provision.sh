#!/bin/bash
# Make a Debian 12 machine able to run Stallscope and its tests. Safe to repeat.
#
# Vagrant runs it inside the machine it has just booted; machine/ runs it in the tree of the image
# (STALLSCOPE_IMAGE=1), where no kernel is running yet and the packages are already in place.
set -euo pipefail

project=${STALLSCOPE_PROJECT:-/vagrant}
venv=/opt/stallscope
in_image=${STALLSCOPE_IMAGE:-}
export DEBIAN_FRONTEND=noninteractive

install_packages() { # FILE...
    local names name missing=()
    names=$(sed 's/#.*//' "$@")
    for name in $names; do
        dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    apt-get update -q
    apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# bcc exists only as a package of the distribution, so the environment must see the system's.
install_python() {
    [ -x "$venv/bin/python" ] || python3 -m venv --system-site-packages "$venv"
    "$venv/bin/pip" install --quiet --no-cache-dir --root-user-action=ignore \
        --editable "$project" --requirement "$project/vagrant/requirements.txt"
    "$venv/bin/python" -c 'import bcc, stallscope'
}

# The environment first for everybody, also under sudo, so that `make` finds it as `python`.
put_on_path() {
    echo "PATH=$venv/bin:\$PATH" >/etc/profile.d/stallscope.sh
    [ -d /etc/sudoers.d ] || return 0
    echo "Defaults secure_path=\"$venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"" \
        >/etc/sudoers.d/stallscope
    chmod 440 /etc/sudoers.d/stallscope
}

# Huge pages make the copy that stalls Redis five times shorter; the tests start their own servers.
settle_the_running_machine() {
    echo 'w /sys/kernel/mm/transparent_hugepage/enabled - - - - never' >/etc/tmpfiles.d/stallscope.conf
    systemd-tmpfiles --create stallscope.conf
    systemctl disable --quiet --now redis-server
    if [ ! -e /sys/kernel/btf/vmlinux ]; then
        echo "provision: kernel $(uname -r) has no BTF; boot a stock Debian kernel (linux-image-amd64)" >&2
        exit 1
    fi
}

# The lab's Redis servers; those that only the internet has are left out where there is none.
build_servers() {
    python3 "$project/vagrant/lab/build.py"
}

install_packages "$project/vagrant/packages.txt"
install_python
put_on_path
if [ -z "$in_image" ]; then
    settle_the_running_machine
    build_servers
fi
