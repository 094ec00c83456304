# Every task of the project. `./just` installs just where it is missing and hands over to this file.

set shell := ["bash", "-euo", "pipefail", "-c"]

cache := env("XDG_CACHE_HOME", home_directory() / ".cache") / "atoll"
# One for each checkout: cargo takes what another one built for its own, by the times of its files.
checkout := replace_regex(sha256(justfile_directory()), '^(.{16}).*$', '$1')
export CARGO_TARGET_DIR := env("CARGO_TARGET_DIR", cache / "target" / checkout)
export ATOLL_ROOT := justfile_directory()
lab := CARGO_TARGET_DIR / "debug/lab"

# List the tasks
default:
    @"{{ just_executable() }}" --justfile "{{ justfile() }}" --list --unsorted

# Boot a host in QEMU, join it to a Supervisor, run a pod, show it, power off
demo: (_tool "lab")
    @{{ lab }} demo

# Like demo, but leave the lab running and say how to reach it
up: (_tool "lab")
    @{{ lab }} up

# Like up, with the test image: CRI reachable from inside the lab's network
up-test: (_tool "lab")
    @{{ lab }} up --test

# Power the lab's host off cleanly and end the lab
down: (_tool "lab")
    @{{ lab }} down

# kubectl against the running lab
[positional-arguments]
kubectl *arguments: (_tool "lab")
    @{{ lab }} kubectl "$@"

# The serial console of the running lab's host
console: (_tool "lab")
    @{{ lab }} console

# Any program inside the running lab's network
[positional-arguments]
run *command: (_tool "lab")
    @{{ lab }} run "$@"

# Formatting, lints, unit tests and end-to-end tests, and one line that counts them all
[positional-arguments]
test *filter: (_tool "suite")
    @{{ CARGO_TARGET_DIR }}/debug/suite all "$@"

# Formatting, lints and tests that need no QEMU
check: (_tool "suite")
    @{{ CARGO_TARGET_DIR }}/debug/suite quick

# End-to-end tests only; a filter picks some of them
[positional-arguments]
e2e *filter: (_tool "suite")
    @{{ CARGO_TARGET_DIR }}/debug/suite e2e "$@"

# The long forms of the tests: 50 power cuts, rounds of 40 pods, every process at every step, an hour of fuzzing (hours)
[positional-arguments]
soak *filter: (_tool "suite")
    @{{ CARGO_TARGET_DIR }}/debug/suite soak "$@"
    @if [ $# -eq 0 ]; then fuzz/soak.sh 200; fi

# Fuzz every target, or those named, for this many seconds each (needs nightly Rust)
[positional-arguments]
fuzz seconds="200" *targets:
    @fuzz/soak.sh "$@"

# Measure the host under a repeatable clock (one instruction is one nanosecond), and check bench/budgets.toml
[positional-arguments]
bench *arguments: setup
    @cargo build --quiet --locked -p atoll-bench --bin bench
    @{{ CARGO_TARGET_DIR }}/debug/bench "$@"

# Build every artefact: programs, Supervisor, release and test image (into out/)
build: (_tool "lab")
    @{{ lab }} build

# Install the Debian packages that builds and tests need (asks nothing)
setup:
    @qemu-test/setup.sh

_tool name: setup
    @echo "==> build the {{ name }} tool" >&2
    @cargo build --quiet --locked -p atoll-qemu-test --bin {{ name }}
