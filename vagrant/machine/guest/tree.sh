#!/bin/bash
# tree.sh TREE MIRROR SECURITY_MIRROR PACKAGE... : a Debian 12 root tree with these packages.
#
# mmdebstrap where it is installed, else debootstrap. Needs root; mounts nothing outside a private
# mount namespace.
set -euo pipefail
tree=$1 mirror=$2 security=$3
shift 3

sources="deb $mirror bookworm main
deb $mirror bookworm-updates main
deb $security bookworm-security main"
# The kernel's package would make an initramfs: we boot a smaller one.
export INITRD=No
# no documentation, no languages
dpkg_options=(force-unsafe-io force-confold
    'path-exclude=/usr/share/man/*' 'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/locale/*')

with_mmdebstrap() {
    mmdebstrap --quiet --mode=root --variant=apt --include="$*" \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
        "${dpkg_options[@]/#/--dpkgopt=}" \
        bookworm "$tree" - <<<"$sources"
}

with_debootstrap() {
    debootstrap --variant=minbase --include=ca-certificates bookworm "$tree" "$mirror"
    echo "$sources" >"$tree/etc/apt/sources.list"
    printf '%s\n' "${dpkg_options[@]}" >"$tree/etc/dpkg/dpkg.cfg.d/stallscope"
    cp /etc/resolv.conf "$tree/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d" # start no service
    chmod +x "$tree/usr/sbin/policy-rc.d"
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --mount sh -ec '
        tree=$1; shift
        mount -t proc proc "$tree/proc"
        chroot "$tree" apt-get -q update
        DEBIAN_FRONTEND=noninteractive chroot "$tree" apt-get install -y -q --no-install-recommends "$@"
    ' sh "$tree" "$@"
    rm -f "$tree/usr/sbin/policy-rc.d"
}

if command -v mmdebstrap >/dev/null && [ -z "${STALLSCOPE_VM_DEBOOTSTRAP:-}" ]; then
    with_mmdebstrap "$@"
else
    with_debootstrap "$@"
fi
rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/* "$tree/etc/resolv.conf"
