#!/bin/sh
# The same WGSL in a browser. Exports the case table and the model's first layer (`egmla export`, into web/data), serves the
# repository on localhost, and lets a headless Chromium run web/index.html on its own software adapter: planted faults that the
# page must notice, the demo on typed texts, then every case. Chromium and Python are installed where they are missing (apt).
#
#   sh scripts/browser.sh                     everything
#   sh scripts/browser.sh --filter attention  the cases whose id contains it
#   sh scripts/browser.sh --quick             without most of the cases of whole layers, for CI
#   sh scripts/browser.sh --serve             only exports, and serves the page for your own browser
#   … --json FILE, --screenshots DIR          the whole result, and pictures of the page
#
# Exit 0: every comparison holds. 1: one does not, or nothing was compared. 77: `not run: why` was printed, since Chromium is
# not to be had here or has no WebGPU.
set -eu
cd "$(dirname "$0")/.."

not_run() {
    echo "browser: not run: $1"
    exit 77
}

serve=no
for argument in "$@"; do
    [ "$argument" != --serve ] || serve=yes
done

want=
command -v python3 >/dev/null 2>&1 || want=python3
[ "$serve" = yes ] || command -v chromium >/dev/null 2>&1 || want="$want chromium"
if [ -n "$want" ]; then
    as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
    command -v apt-get >/dev/null 2>&1 || not_run "no $want here, and no apt-get to install it with"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null 2>&1 || not_run "no $want here, and neither root nor sudo"
    echo "browser: installing $want" >&2
    # shellcheck disable=SC2086
    if ! { as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -qq $want; } >&2; then
        not_run "$want does not install"
    fi
    for program in $want; do
        command -v "$program" >/dev/null 2>&1 || not_run "apt-get installed no $program"
    done
fi

sh scripts/setup.sh
subgroups=
if [ "$serve" = no ]; then
    # Kernels that use subgroups are planned for those of the browser, where it has some.
    sizes=$(python3 scripts/browser.py --subgroups) || { echo "$sizes"; exit 77; }
    [ -z "$sizes" ] || subgroups="--subgroups $sizes"
fi
rm -rf web/data
# shellcheck disable=SC2086
cargo run --quiet -- export --out web/data --model models/shakespeare $subgroups
exec python3 scripts/browser.py "$@"
