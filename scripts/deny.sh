#!/bin/sh
# Licences, duplicate versions, sources and advisories of the dependency trees: of the library with its program, and of the
# fuzz targets. The rules are deny.toml's. Installs cargo-deny where it is missing. Status 1 when a rule is broken.
#
#   ADVISORY_DB=DIR   a checkout of RustSec's advisory-db to read, where their server cannot be reached
#
# Without either the advisories are not checked, which is said and is no failure; ADVISORIES=required makes it one.
set -eu
cd "$(dirname "$0")/.."

command -v cargo-deny >/dev/null 2>&1 || cargo install --quiet --locked cargo-deny

export GIT_TERMINAL_PROMPT=0
db=https://github.com/RustSec/advisory-db
if [ -n "${ADVISORY_DB:-}" ]; then
    # cargo-deny fetches with git, which fetches from here instead.
    from=$(cd "$ADVISORY_DB" && pwd)
    export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0="url.file://$from.insteadOf" GIT_CONFIG_VALUE_0="$db"
fi

# The rules must be able to fail: a crate whose licence is not allowed, and one that comes from elsewhere than crates.io.
planted=$(mktemp -d)
trap 'rm -rf "$planted"' EXIT
crate() {
    mkdir -p "$planted/$1/src"
    : >"$planted/$1/src/lib.rs"
    printf '[package]\nname = "%s"\nversion = "0.1.0"\nlicense = "%s"\n%s\n' "$1" "$2" "${3:-}" >"$planted/$1/Cargo.toml"
}
crate copyleft GPL-3.0-only
crate elsewhere MIT
git -C "$planted/elsewhere" init -q
git -C "$planted/elsewhere" add .
git -C "$planted/elsewhere" -c user.name=planted -c user.email=planted@localhost commit -q -m planted
crate user MIT "[dependencies]
elsewhere = { git = \"file://$planted/elsewhere\" }"
for broken in 'copyleft licenses rejected' 'user sources source-not-allowed'; do
    set -- $broken
    if cargo deny --manifest-path "$planted/$1/Cargo.toml" --config deny.toml check "$2" >"$planted/log" 2>&1 ||
        ! grep -q "error\[$3\]" "$planted/log"; then
        echo "error: the rules for $2 let a planted violation pass" >&2
        cat "$planted/log" >&2
        exit 1
    fi
done
echo "== planted violations are found: a licence, a source"

status=0
for manifest in Cargo.toml fuzz/Cargo.toml; do
    echo "== $manifest: licences, duplicates, sources"
    cargo deny --locked --manifest-path "$manifest" --config deny.toml check --hide-inclusion-graph bans licenses sources ||
        status=1
done

if reason=$(git ls-remote --exit-code "$db" main 2>&1 >/dev/null); then
    for manifest in Cargo.toml fuzz/Cargo.toml; do
        echo "== $manifest: advisories"
        cargo deny --locked --manifest-path "$manifest" --config deny.toml check advisories || status=1
    done
else
    echo "== advisories: not run: $(echo "$reason" | tail -n 1)"
    [ "${ADVISORIES:-}" != required ] || status=1
fi
exit "$status"
