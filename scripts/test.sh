#!/bin/sh
# Everything that must hold, on a fresh Debian or Ubuntu machine with Rust: installs a software Vulkan driver where there
# is none, then runs every test. Arguments go to `cargo test`.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
cargo test --no-fail-fast "$@"
