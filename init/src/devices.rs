//! Devices as long as the host runs: power buttons are listened to, and drivers are loaded for what is plugged in.

use crate::clock::uptime;
use crate::console::Console;
use crate::error::{Error, Result, chain};
use crate::hotplug::Hotplug;
use crate::modules;
use crate::power_button::PowerButtons;
use crate::process::{self, Program};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// How long the drivers of one batch are waited for before those of the next are asked for.
const DRIVER_WITHIN: Duration = Duration::from_secs(20);
/// Most runs of modprobe that are late; with that many, what comes next waits for one of them to end.
const MOST_LATE: usize = 8;

/// The runs of modprobe for what was plugged in. One that is late is not killed, which could break the driver's probe:
/// it goes on, and the next batch no longer waits for it.
#[derive(Debug, Default)]
struct Loading {
    current: Option<(u32, Duration)>,
    late: Vec<u32>,
}

impl Loading {
    fn is_free(&self) -> bool {
        self.current.is_none() && self.late.len() < MOST_LATE
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.current.map(|(_, until)| until)
    }

    fn started(&mut self, pid: u32, now: Duration) {
        self.current = Some((pid, now + DRIVER_WITHIN));
    }

    /// Whether the current run has just become late.
    fn turned_late(&mut self, now: Duration) -> bool {
        let overdue = self.current.take_if(|(_, until)| now >= *until);
        self.late.extend(overdue.map(|(pid, _)| pid));
        overdue.is_some()
    }

    /// A process has ended; whether it was one of these.
    fn ended(&mut self, pid: u32) -> bool {
        let before = self.late.len();
        self.late.retain(|late| *late != pid);
        self.current.take_if(|(current, _)| *current == pid).is_some() || self.late.len() < before
    }
}

/// Buttons, news of devices, and what is loaded for them.
#[derive(Debug, Default)]
pub struct Devices {
    hotplug: Option<Hotplug>,
    buttons: PowerButtons,
    loading: Loading,
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
        let free = self.loading.is_free();
        let due = self.hotplug.as_ref().filter(|_| free).and_then(Hotplug::next_deadline);
        self.loading.next_deadline().or(due)
    }

    /// Reads what there is to read; whether a power button was pressed.
    pub fn read(&mut self, console: &Console) -> bool {
        let now = uptime();
        let pressed = self.buttons.pressed();
        let Some(hotplug) = &mut self.hotplug else { return pressed };
        hotplug.read(now);
        if hotplug.take_seen_input() {
            self.buttons.look();
        }
        self.load_due(now, console, start_modprobe);
        pressed
    }

    fn load_due(&mut self, now: Duration, console: &Console, start: impl FnOnce(&[String]) -> Result<u32>) {
        if self.loading.turned_late(now) {
            let seconds = DRIVER_WITHIN.as_secs();
            console
                .say(format!("a driver of a new device takes longer than {seconds} s: it goes on by itself"));
        }
        let Some(hotplug) = self.hotplug.as_mut().filter(|_| self.loading.is_free()) else { return };
        let batch = hotplug.take_due(now, modules::BATCH);
        if batch.is_empty() {
            return;
        }
        match start(&batch) {
            Ok(pid) => self.loading.started(pid, now),
            Err(error) => console.say(format!("no driver for a new device: {}", chain(&error))),
        }
    }

    /// A process has ended; whether it was ours.
    pub fn ended(&mut self, pid: u32) -> bool {
        let ours = self.loading.ended(pid);
        if ours {
            self.buttons.look();
        }
        ours
    }
}

fn start_modprobe(aliases: &[String]) -> Result<u32> {
    let null =
        std::fs::File::options().write(true).open("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    let child = process::spawn(&Program {
        command: &modules::modprobe(aliases),
        environment: &["PATH=/usr/sbin:/usr/bin".to_owned()],
        confinement: None,
        cgroup: None,
        output: null.as_fd(),
    })?;
    Ok(child.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Devices of which this many were plugged in, and the time when their drivers are due.
    fn plugged_in(count: usize) -> (Devices, Duration) {
        let mut hotplug = Hotplug::open().unwrap();
        for number in 0..count {
            let message = format!("add@/devices/a\0MODALIAS=usb:{number:04}\0");
            hotplug.take(Duration::ZERO, message.as_bytes());
        }
        let now = hotplug.next_deadline().unwrap();
        (Devices { hotplug: Some(hotplug), ..Devices::default() }, now)
    }

    #[test]
    fn a_batch_that_does_not_start_and_one_that_is_late_lose_no_other() {
        let console = Console::start();
        let (mut devices, now) = plugged_in(2 * modules::BATCH + 1);
        devices
            .load_due(now, &console, |_| Err(Error::system("start it")(std::io::Error::other("no memory"))));
        assert_eq!(devices.next_deadline(), Some(now), "the rest is still due");
        devices.load_due(now, &console, |batch| {
            assert_eq!((batch[0].as_str(), batch.len()), ("usb:0256", modules::BATCH));
            Ok(7)
        });
        let late = now + DRIVER_WITHIN;
        assert_eq!(devices.next_deadline(), Some(late));
        devices.load_due(now, &console, |_| panic!("the one before has its time"));
        devices.load_due(late, &console, |batch| {
            assert_eq!(batch, ["usb:0512"]);
            Ok(8)
        });
        assert!(devices.ended(8) && devices.ended(7) && !devices.ended(7));
        assert_eq!(devices.next_deadline(), None);
    }

    #[test]
    fn runs_that_never_end_do_not_pile_up_and_what_waits_for_them_is_not_lost() {
        let console = Console::start();
        let (mut devices, mut now) = plugged_in((MOST_LATE + 1) * modules::BATCH);
        for pid in 0..MOST_LATE {
            devices.load_due(now, &console, |_| Ok(u32::try_from(pid).unwrap()));
            now += DRIVER_WITHIN;
        }
        devices.load_due(now, &console, |_| panic!("one more beside those that are late"));
        assert_eq!(devices.next_deadline(), None, "only an end makes room");
        assert!(devices.ended(3));
        let mut last = 0;
        devices.load_due(now, &console, |batch| {
            last = batch.len();
            Ok(100)
        });
        assert_eq!(last, modules::BATCH);
    }
}
