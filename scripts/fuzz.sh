#!/bin/sh
# Fuzzes every reader and every plan: scripts/fuzz.sh [SECONDS] [TARGET...]; 30 seconds each and all of them without.
#
# Installs cargo-fuzz where it is missing; stable Rust is enough. Prints a line a target: executions, findings, places of the
# code that were reached, seconds on the clock and of the processor. Status 1 when anything was found: fuzz/artifacts/TARGET
# holds the input, and `cargo fuzz run -s none TARGET FILE` runs it again. What was learnt stays in fuzz/corpus for the next
# run. Calls for different targets may run side by side.
set -eu
cd "$(dirname "$0")/.."

seconds=${1:-30}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- attend config fp8 gguf index layer model plan weights

command -v cargo-fuzz >/dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz
# No sanitizer: the library has no unsafe code to watch, and they want a nightly compiler.
cargo fuzz build -s none

# Sets `used` to the whole seconds of the processor that everything this shell has waited for has taken. Not a subshell's
# `times`: that one has waited for nothing.
used_so_far() {
    times >"$log.times"
    used=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, part, /[ms]/); sum += 60 * part[1] + part[2] } printf "%d", sum }' "$log.times")
    rm -f "$log.times"
}

status=0
for target in "$@"; do
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    log=fuzz/artifacts/$target.log
    failed=0
    used_so_far
    before=$used
    # An input has two minutes, which a busy machine stretches, and the process 2 GiB; panics, overflows and what a target
    # asserts end it.
    cargo fuzz run -s none "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -timeout=120 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1 >"$log" 2>&1 || failed=1
    executions=$(awk '/^stat::number_of_executed_units/ { print $2 }' "$log")
    reached=$(awk '/ cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") reached = $(i + 1) } END { print reached + 0 }' "$log")
    used_so_far
    used=$((used - before))
    if [ "$failed" -eq 0 ]; then
        echo "$target: ${executions:-0} executions, no finding, $reached places reached, $seconds s, $used s of CPU"
    else
        status=1
        echo "$target: ${executions:-0} executions, A FINDING, $reached places reached, $used s of CPU; it ends with:"
        grep -a -e 'panicked at' -A 1 -e '^SUMMARY' -e 'Test unit written' "$log" | sed 's/^/    /' || tail -n 20 "$log"
    fi
    rm -f "$log"
done
exit "$status"
