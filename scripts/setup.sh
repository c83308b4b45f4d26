#!/bin/sh
# Makes a Debian or Ubuntu machine with Rust able to build egmla and to run its kernels: a C linker where there is
# none, and a software Vulkan driver (Mesa's lavapipe) where there is no Vulkan driver at all. A machine that already
# has both is left as it is. Needs root or sudo only when something has to be installed.
set -eu
# ldconfig is not in every user's path.
PATH="$PATH:/usr/sbin:/sbin"

have_driver() {
    listed=$(echo "${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}" | tr ':' ' ')
    for manifest in /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json $listed; do
        [ -f "$manifest" ] && return 0
    done
    return 1
}
have_loader() {
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' && return 0
    ls /usr/lib/*/libvulkan.so.1 /usr/lib*/libvulkan.so.1 >/dev/null 2>&1
}

want=""
command -v cc >/dev/null 2>&1 || want="gcc libc6-dev"
have_loader || want="$want libvulkan1"
need_mesa=no
have_driver || { need_mesa=yes; want="$want mesa-vulkan-drivers"; }
[ -n "$want" ] || { echo "setup: a C linker and a Vulkan driver are here" >&2; exit 0; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
can_install() { command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null 2>&1; }; }
if ! can_install; then
    if command -v cc >/dev/null 2>&1; then
        echo "setup:$want cannot be installed here (no apt-get, or neither root nor sudo): the program will compute on the CPU" >&2
        exit 0
    fi
    echo "setup: install these by hand: $want" >&2
    exit 1
fi
install_packages() { as_root env DEBIAN_FRONTEND=noninteractive apt-get "$@" install -y --no-install-recommends -qq $want >&2; }

echo "setup: installing $want" >&2
as_root apt-get update -qq >&2

# Mesa 22.3 of Debian 12 ends loops after 65 535 trips and is slower; its backports carry Mesa 25. They come from the
# mirror that apt already uses, through a sources folder of our own so that the machine's configuration stays as it is.
codename=$(. /etc/os-release && echo "${ID:-}-${VERSION_CODENAME:-}")
if [ "$need_mesa" = yes ] && [ "$codename" = debian-bookworm ]; then
    sources=$(mktemp -d)
    trap 'rm -rf "$sources"' EXIT
    chmod 755 "$sources"
    cp /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list "$sources" 2>/dev/null || true
    for file in "$sources"/*; do
        [ -f "$file" ] || continue
        case "$file" in
        *.sources) # The stanza of the release itself, with another suite.
            awk 'BEGIN { RS = ""; ORS = "\n\n" } /Suites: bookworm( |\n|$)/' "$file" |
                sed 's/^Suites:.*/Suites: bookworm-backports/' >>"$sources/egmla-backports.sources" ;;
        *) grep -E '^deb (\[[^]]*\] )?[^ ]+ bookworm main' "$file" | head -n 1 |
            sed 's/ bookworm main.*/ bookworm-backports main/' >>"$sources/egmla-backports.list" ;;
        esac
    done
    if as_root apt-get -o Dir::Etc::sourceparts="$sources" update -qq >&2 &&
        install_packages -o Dir::Etc::sourceparts="$sources" -t bookworm-backports; then
        exit 0
    fi
    echo "setup: no backports at this mirror; taking the release's own Mesa" >&2
fi
install_packages
