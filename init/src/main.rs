//! Entry point of `atoll-init`. As PID 1 it never returns: whatever goes wrong is told on the console and then
//! follows the boot failure policy.

use atoll_init::boot::{self, Boot};
use atoll_init::command_line::Options;
use atoll_init::console::Console;
use atoll_init::control::Bus;
use atoll_init::devices::Devices;
use atoll_init::error::{Error, chain};
use atoll_init::event_loop::{Doors, EventLoop};
use atoll_init::notify::NotifySocket;
use atoll_init::programs::Programs;
use atoll_init::reap::{self, Signals};
use atoll_init::shutdown::{self, Machine};
use atoll_init::sys::{self, Kernel};
use atoll_init::watchdog::Guard;
use atoll_spec::control::{BUS_SOCKET, NOTIFY_SOCKET, ShutdownAction};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

fn main() {
    if std::process::id() != 1 {
        println!(
            "atoll-init {}: PID 1 of the Atoll host; it runs as nothing else",
            env!("CARGO_PKG_VERSION")
        );
        return;
    }
    run_as_pid_1()
}

fn run_as_pid_1() -> ! {
    // Before any thread, so that all of them inherit it.
    let signals = sys::block_signals();
    let console = Console::start();
    console.say(format!("Atoll {}", env!("CARGO_PKG_VERSION")));
    say_panics(&console);
    if let Err(error) = signals {
        console.say(format!("signals are not blocked, shutting down by signal will not work: {error}"));
    }
    let guard = Guard::start(&console, Kernel).unwrap_or_else(|error| {
        console.say(format!("no guard: a step that hangs will hang for ever: {}", chain(&error)));
        Guard::default()
    });
    let mut boot = Boot {
        sys: &Kernel,
        console: &console,
        guard: &guard,
        options: Options::default(),
        services: Vec::new(),
        devices: Devices::default(),
        phases: Vec::new(),
    };
    let failure = catch_unwind(AssertUnwindSafe(|| live(&mut boot)));
    let (phase, error) = match failure {
        Ok((phase, error)) => (phase, chain(&error)),
        Err(_) => {
            ("unknown", "init panicked, which is a defect of init; the line above says where".to_owned())
        }
    };
    // A panic while failing must not end PID 1 either.
    let told = catch_unwind(AssertUnwindSafe(|| boot::fail(&boot, phase, &error)));
    if told.is_err() {
        let machine = Machine { sys: &Kernel, console: &console, guard: &guard };
        shutdown::force(&machine, ShutdownAction::Reboot, "init panicked twice");
    }
    // Held, or the kernel refused to reboot: PID 1 stays, and still collects the dead.
    loop {
        while reap::collect().is_some() {}
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// The life of a host. Returns only what made it fail.
fn live(boot: &mut Boot<'_>) -> (&'static str, Error) {
    if let Err(failure) = boot::run(boot) {
        return failure;
    }
    let devices = std::mem::take(&mut boot.devices);
    let doors = match doors(boot.console, devices) {
        Ok(doors) => doors,
        Err(error) => return ("services", error),
    };
    let machine = || Machine { sys: boot.sys, console: boot.console, guard: boot.guard };
    let log = boot.options.log.as_deref();
    let programs = Programs::new(boot.services.clone(), Path::new(NOTIFY_SOCKET), log);
    let action = EventLoop::new(machine(), programs, boot.phases.clone(), doors).run();
    shutdown::finish(&machine(), action);
    let source = std::io::Error::other("the kernel went on after reboot(2)");
    ("shutdown", Error::System { operation: "end the machine's run", source })
}

fn doors(console: &Console, devices: Devices) -> Result<Doors, Error> {
    Ok(Doors {
        notify: NotifySocket::bind(Path::new(NOTIFY_SOCKET))?,
        bus: Bus::start(Path::new(BUS_SOCKET), console)?,
        signals: Signals::open()?,
        devices,
    })
}

fn say_panics(console: &Console) {
    let console = console.clone();
    std::panic::set_hook(Box::new(move |panic| {
        console.say(format!("PANIC: {panic}").replace('\n', " "));
        console.flush(Duration::from_secs(1));
    }));
}
