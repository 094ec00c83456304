//! The boot, as a list: phases in order, each with a deadline, one console line with its time, and what its failure
//! means. After the list the services start, which is the last phase and the event loop's.

use crate::clock::{millis, uptime};
use crate::command_line::{BootFailurePolicy, Options};
use crate::console::Console;
use crate::devices::Devices;
use crate::error::{Error, Result, chain};
use crate::services::{self, Service};
use crate::shutdown::{self, Machine};
use crate::sys::Syscalls;
use crate::watchdog::Guard;
use crate::{cgroups, hardening, identity, modules, mounts};
use atoll_spec::control::{BootPhase, ShutdownAction};
use std::time::Duration;

/// How long a person has to read what failed before the machine boots again.
const COUNTDOWN_S: u64 = 30;
/// Storage controllers with many disks take a minute and more each.
const DRIVERS_WITHIN_S: u64 = 150;
/// What the drivers phase keeps of that for what it does after it has waited.
const DRIVERS_SPARE_S: u64 = 10;

/// What a boot works on and what it makes.
pub struct Boot<'a> {
    /// The kernel.
    pub sys: &'a dyn Syscalls,
    /// Where phases are told.
    pub console: &'a Console,
    /// Who enforces deadlines.
    pub guard: &'a Guard,
    /// The kernel command line.
    pub options: Options,
    /// The services of this image.
    pub services: Vec<Service>,
    /// Power buttons and what is plugged in.
    pub devices: Devices,
    /// Phases that are over.
    pub phases: Vec<BootPhase>,
}

/// What the failure of a phase means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// There is no host without it.
    EndsBoot,
    /// The host is worse for it, yet reachable, which is how it gets mended.
    IsTold,
}

struct Phase {
    name: &'static str,
    deadline: Duration,
    failure: Failure,
    run: fn(&mut Boot<'_>) -> Result<()>,
}

const fn phase(
    name: &'static str,
    deadline_s: u64,
    failure: Failure,
    run: fn(&mut Boot<'_>) -> Result<()>,
) -> Phase {
    Phase { name, deadline: Duration::from_secs(deadline_s), failure, run }
}

const PHASES: [Phase; 9] = [
    phase("mounts", 10, Failure::EndsBoot, pseudo_file_systems),
    phase("modules", 20, Failure::EndsBoot, |boot| modules::early(boot.sys)),
    phase("system", 20, Failure::EndsBoot, |boot| mounts::system_tree(boot.sys)),
    phase("file-systems", 10, Failure::EndsBoot, |boot| mounts::rest(boot.sys)),
    phase("hardening", 10, Failure::IsTold, |boot| hardening::apply(boot.sys)),
    phase("identity", 10, Failure::IsTold, |boot| identity::establish(boot.sys)),
    phase("drivers", DRIVERS_WITHIN_S, Failure::IsTold, drivers),
    phase("watchdog", 10, Failure::IsTold, watchdog),
    phase("cgroups", 10, Failure::IsTold, service_table_and_cgroups),
];

/// Runs all phases.
///
/// # Errors
/// The name and error of the phase that ended the boot.
pub fn run(boot: &mut Boot<'_>) -> std::result::Result<(), (&'static str, Error)> {
    for phase in &PHASES {
        let started = uptime();
        let label = format!("boot phase {}", phase.name);
        let countdown = Duration::from_secs(COUNTDOWN_S);
        boot.guard.promise(&label, phase.deadline, countdown, ShutdownAction::Reboot);
        let outcome = (phase.run)(boot);
        let took = uptime().saturating_sub(started);
        let problem = match outcome {
            Ok(()) => String::new(),
            Err(error) if phase.failure == Failure::EndsBoot => return Err((phase.name, error)),
            Err(error) => chain(&error),
        };
        tell(boot, phase.name, started, took, problem);
    }
    boot.guard.release();
    Ok(())
}

/// Records a phase and says so.
fn tell(boot: &mut Boot<'_>, name: &str, started: Duration, took: Duration, problem: String) {
    boot.console.say(line(name, took, &problem));
    boot.phases.push(BootPhase {
        name: name.to_owned(),
        started_ms: millis(started),
        took_ms: millis(took),
        problem,
    });
}

/// The console line of a phase.
pub fn line(name: &str, took: Duration, problem: &str) -> String {
    let took = millis(took);
    if problem.is_empty() {
        format!("phase {name} done in {took} ms")
    } else {
        format!("phase {name} incomplete after {took} ms: {problem}")
    }
}

fn pseudo_file_systems(boot: &mut Boot<'_>) -> Result<()> {
    mounts::first(boot.sys)?;
    boot.console.open();
    boot.options = Options::parse(&boot.sys.read("/proc/cmdline").unwrap_or_default());
    boot.sys.catch_ctrl_alt_del().map_err(Error::system("take over Ctrl-Alt-Del"))
}

fn drivers(boot: &mut Boot<'_>) -> Result<()> {
    // First listen, then look: what comes in between is seen twice and not never.
    let listening = boot.devices.listen();
    let until = uptime() + Duration::from_secs(DRIVERS_WITHIN_S - DRIVERS_SPARE_S);
    let (devices, loaded) = modules::coldplug(boot.sys, until);
    boot.console.say(format!("asked for the drivers of {devices} kinds of devices"));
    Error::all(listening.err().into_iter().chain(loaded.err()).collect())
}

fn watchdog(boot: &mut Boot<'_>) -> Result<()> {
    let facts = boot.guard.take_watchdog()?;
    boot.console.say(format!("watchdog {}: resets the machine after {} s", facts.identity, facts.timeout_s));
    if facts.has_bitten {
        boot.console.say("the last run of this machine was ended by its watchdog");
    }
    Ok(())
}

fn service_table_and_cgroups(boot: &mut Boot<'_>) -> Result<()> {
    let (services, problem) = match services::with_tests(boot.sys) {
        Ok(services) => (services, None),
        Err(error) => (services::table(), Some(error)),
    };
    boot.services = services;
    let prepared = cgroups::prepare(boot.sys, &boot.services);
    Error::all(problem.into_iter().chain(prepared.err()).collect())
}

/// What follows a failed boot: it is told, counted down, and then done by policy.
pub fn fail(boot: &Boot<'_>, phase: &str, error: &str) {
    let machine = Machine { sys: boot.sys, console: boot.console, guard: boot.guard };
    boot.console.say("=== THE BOOT FAILED ===");
    boot.console.say(format!("phase {phase}: {error}"));
    let done: Vec<&str> = boot.phases.iter().map(|phase| phase.name.as_str()).collect();
    boot.console
        .say(format!("done before it: {}", if done.is_empty() { "nothing".into() } else { done.join(", ") }));
    let (word, action) = match boot.options.boot_failure {
        BootFailurePolicy::Reboot => ("reboots", ShutdownAction::Reboot),
        BootFailurePolicy::PowerOff => ("switches off", ShutdownAction::PowerOff),
        BootFailurePolicy::Hold => {
            boot.guard.release();
            boot.console.say("the machine stays as it is, as atoll.boot-failure=hold asks");
            return;
        }
    };
    let within = Duration::from_secs(COUNTDOWN_S + 10);
    boot.guard.promise("the countdown", within, Duration::ZERO, action);
    for left in (1..=COUNTDOWN_S).rev() {
        if left % 10 == 0 || left <= 3 {
            boot.console.say(format!("the machine {word} in {left} s"));
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    shutdown::force(&machine, action, &format!("phase {phase}: {error}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    fn boot_with<T>(fake: &Fake, run: impl FnOnce(&mut Boot<'_>) -> T) -> T {
        let (console, guard) = (Console::start(), Guard::default());
        run(&mut Boot {
            sys: fake,
            console: &console,
            guard: &guard,
            options: Options::default(),
            services: Vec::new(),
            devices: Devices::default(),
            phases: Vec::new(),
        })
    }

    fn run_until(fake: &Fake, last: &str) -> std::result::Result<(), (&'static str, Error)> {
        boot_with(fake, |boot| {
            for phase in PHASES.iter().take_while(|phase| phase.name != last) {
                (phase.run)(boot).map_err(|error| (phase.name, error))?;
            }
            Ok(())
        })
    }

    #[test]
    fn the_way_to_the_system_tree() {
        let fake = Fake::default();
        fake.file("/modules.early", "/modules/crc32c_generic.ko\n/modules/erofs.ko\n");
        run_until(&fake, "file-systems").unwrap();
        let calls: Vec<String> =
            fake.calls().into_iter().filter(|call| !call.starts_with("directory")).collect();
        assert_eq!(
            calls,
            [
                "mount proc /proc proc",
                "mount sysfs /sys sysfs",
                "mount devtmpfs /dev devtmpfs",
                "catch_ctrl_alt_del",
                "load_module /modules/crc32c_generic.ko",
                "load_module /modules/erofs.ko",
                "mount /system.erofs /system erofs",
                "move_mount /proc /system/proc",
                "move_mount /sys /system/sys",
                "move_mount /dev /system/dev",
                "enter_root /system",
            ]
        );
    }

    #[test]
    fn a_module_that_is_there_already_is_no_failure_and_one_that_is_not_ends_the_boot() {
        let fake = Fake::default();
        fake.file("/modules.early", "/modules/a.ko\n/modules/b.ko\n");
        fake.fail("load_module /modules/a.ko", std::io::ErrorKind::AlreadyExists);
        run_until(&fake, "system").unwrap();
        fake.fail("load_module /modules/b.ko", std::io::ErrorKind::NotFound);
        let (phase, error) = run_until(&fake, "system").unwrap_err();
        assert_eq!(phase, "modules");
        assert!(error.to_string().contains("/modules/b.ko"), "{error}");
    }

    #[test]
    fn file_systems_a_kernel_lacks_are_passed_over_unless_needed() {
        let fake = Fake::default();
        fake.fail("mount efivarfs", std::io::ErrorKind::NotFound);
        mounts::rest(&fake).unwrap();
        fake.fail("mount cgroup2", std::io::ErrorKind::NotFound);
        assert!(mounts::rest(&fake).unwrap_err().to_string().contains("/sys/fs/cgroup"));
    }

    #[test]
    fn every_phase_has_a_name_of_its_own() {
        let mut names: Vec<&str> = PHASES.iter().map(|phase| phase.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PHASES.len());
    }
}
