#!/usr/bin/env bash
# Fuzzes every target, or those named, for the given seconds each, with nightly Rust's address sanitiser:
#   fuzz/soak.sh SECONDS [TARGET…]
# With --keep before the seconds, what was found is minimised and added to the committed corpus (small inputs only).
# A finding ends the run with an error that names the input.
set -euo pipefail
cd "$(dirname "$0")"
readonly version=0.13.2
readonly work=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
keep=no
if [ "${1:-}" = --keep ]; then
    keep=yes
    shift
fi
if [ $# -lt 1 ]; then
    sed -n '2,5s/^# \?//p' "$0" >&2
    exit 2
fi
readonly seconds=$1
shift
if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "error: fuzzing needs a nightly Rust: rustup toolchain install nightly" >&2
    exit 1
fi
if ! cargo fuzz --version 2>/dev/null | grep -qxF "cargo-fuzz $version"; then
    echo "==> install cargo-fuzz $version" >&2
    cargo install --quiet --locked --version "$version" cargo-fuzz
fi
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for file in targets/src/*.rs; do
        targets+=("$(basename "$file" .rs)")
    done
fi
export CARGO_TARGET_DIR=$work/build
cargo +nightly fuzz build --fuzz-dir targets
for target in "${targets[@]}"; do
    echo "==> $target for $seconds s"
    found=$work/corpus/$target
    mkdir -p "$found" "$work/artifacts/$target"
    log=$work/$target.log
    if ! cargo +nightly fuzz run --fuzz-dir targets "$target" "$found" "corpus/$target" -- \
        -max_total_time="$seconds" -max_len=65536 -timeout=20 -rss_limit_mb=2048 \
        -artifact_prefix="$work/artifacts/$target/" >"$log" 2>&1; then
        tail -n 60 "$log" >&2
        echo "error: $target failed; the input is in $work/artifacts/$target, the log in $log" >&2
        exit 1
    fi
    grep -E '^(Done|stat::|#[0-9]+.*DONE)' "$log" || true
    if [ "$keep" = yes ]; then
        # What covers the same with less, and of that what is small.
        least=$work/least/$target
        rm -rf "$least"
        mkdir -p "$least"
        cargo +nightly fuzz run --fuzz-dir targets "$target" "$least" "corpus/$target" "$found" -- \
            -merge=1 -max_len=16384 >>"$log" 2>&1
        find "$least" -type f -size -5k | sort | head -n 60 | while read -r input; do
            cp -n "$input" "corpus/$target/"
        done
    fi
done
