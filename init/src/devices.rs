//! Devices as long as the host runs: power buttons are listened to, and drivers are loaded for what is plugged in.

use crate::clock::uptime;
use crate::console::Console;
use crate::error::{Error, Result, chain};
use crate::hotplug::Hotplug;
use crate::modules;
use crate::power_button::PowerButtons;
use crate::process::{self, Child, Program};
use crate::sys::{Signal, Syscalls, Target};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Longest run of modprobe for what was plugged in.
const DRIVER_WITHIN: Duration = Duration::from_secs(20);

/// Buttons, news of devices, and the modprobe that is running for them.
#[derive(Debug, Default)]
pub struct Devices {
    hotplug: Option<Hotplug>,
    buttons: PowerButtons,
    driver: Option<(Child, Duration)>,
}

impl Devices {
    /// Starts to listen. To be called before the boot looks for devices, so that none is missed in between.
    ///
    /// # Errors
    /// When the kernel does not tell of new devices.
    pub fn listen(&mut self) -> Result<()> {
        self.hotplug = Some(Hotplug::open()?);
        Ok(())
    }

    /// Looks for power buttons; how many there are.
    pub fn look_for_buttons(&mut self) -> usize {
        self.buttons.look();
        self.buttons.count()
    }

    /// Descriptors to wait on.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.hotplug.iter().map(AsFd::as_fd).chain(self.buttons.descriptors())
    }

    /// When [`Devices::read`] is due.
    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.driver {
            Some((_, until)) => Some(*until),
            None => self.hotplug.as_ref().and_then(Hotplug::next_deadline),
        }
    }

    /// Reads what there is to read; whether a power button was pressed.
    pub fn read(&mut self, sys: &dyn Syscalls, console: &Console) -> bool {
        let now = uptime();
        let pressed = self.buttons.pressed();
        let Some(hotplug) = &mut self.hotplug else { return pressed };
        hotplug.read(now);
        if hotplug.take_seen_input() {
            self.buttons.look();
        }
        match &mut self.driver {
            Some((child, until)) if now >= *until => {
                // Asked once for each round, until it has ended and is collected.
                let _ = sys.kill(Target::Process(child.pid), Signal::Kill);
                *until = now + DRIVER_WITHIN;
            }
            Some(_) => {}
            None => {
                if let Some(aliases) = hotplug.take_due(now).filter(|aliases| !aliases.is_empty()) {
                    match start_modprobe(&aliases) {
                        Ok(child) => self.driver = Some((child, now + DRIVER_WITHIN)),
                        Err(error) => console.say(format!("no driver for a new device: {}", chain(&error))),
                    }
                }
            }
        }
        pressed
    }

    /// A process has ended; whether it was ours.
    pub fn ended(&mut self, pid: u32) -> bool {
        if self.driver.as_ref().is_none_or(|(child, _)| child.pid != pid) {
            return false;
        }
        self.driver = None;
        self.buttons.look();
        true
    }
}

fn start_modprobe(aliases: &[String]) -> Result<Child> {
    let null =
        std::fs::File::options().write(true).open("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    process::spawn(&Program {
        command: &modules::modprobe(aliases),
        environment: &["PATH=/usr/sbin:/usr/bin".to_owned()],
        confinement: None,
        cgroup: None,
        output: null.as_fd(),
    })
}
