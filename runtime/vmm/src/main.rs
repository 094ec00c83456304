//! Entry point of `atoll-vmm`: run, say in one line what went wrong, exit with the status that the runtime reads.

use atoll_spec::vm::exit::VMM_FAILED;
use std::io::Write;

fn main() {
    std::panic::set_hook(Box::new(|panic| fail(&panic.to_string().replace('\n', ": "))));
    match atoll_vmm::run() {
        Ok((status, None)) => std::process::exit(status),
        Ok((status, Some(line))) => {
            say(&line);
            std::process::exit(status);
        }
        Err(error) => fail(&error.chain()),
    }
}

/// A panic in any thread ends the process: a machine without one of its threads is none.
fn fail(line: &str) -> ! {
    say(line);
    std::process::exit(VMM_FAILED);
}

fn say(line: &str) {
    // Nobody may be reading any more, which changes nothing about the end.
    drop(writeln!(std::io::stderr(), "atoll-vmm: {line}"));
}
