//! The virtual machine that a checkpoint is started in, as QEMU's command line. Pure.
//!
//! What must never happen here: a network that nobody asked for. Two machines that both take themselves for web1 do harm.

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::json;

/// The program, looked for in PATH.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";
const MEMORY_MIB: u32 = 2048;
/// The longest serial number that all kinds of disks take.
const SERIAL_MAX: usize = 20;

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Drive {
    /// Where it is exported.
    pub(crate) socket: PathBuf,
    /// The device's name on the agent; empty if that is not known.
    pub(crate) device: String,
    /// The disk's id.
    pub(crate) disk: String,
}

impl Drive {
    /// A controller of the kind the disk had: its driver is in the machine's initial RAM disk.
    fn controller(&self, number: usize) -> String {
        match self.device.strip_prefix("/dev/").unwrap_or(&self.device) {
            // The machine's AHCI has six ports.
            name if (name.starts_with("sd") || name.starts_with("hd")) && number < 6 => {
                format!("ide-hd,bus=ide.{number}")
            }
            name if name.starts_with("vd") || name.starts_with("xvd") => "virtio-blk-pci".to_owned(),
            _ => "nvme".to_owned(),
        }
    }

    fn arguments(&self, number: usize) -> [OsString; 4] {
        // As JSON, where a comma is only a comma.
        let node = json!({
            "driver": "nbd",
            "node-name": format!("disk{number}"),
            "server": { "type": "unix", "path": self.socket.to_string_lossy() },
            "discard": "unmap",
        });
        let serial: String = self.disk.chars().filter(|c| *c != ',').take(SERIAL_MAX).collect();
        let controller = self.controller(number);
        let device = format!("{controller},drive=disk{number},serial={serial},bootindex={number}");
        ["-blockdev".into(), node.to_string().into(), "-device".into(), device.into()]
    }
}

/// Who the machine's serial console is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serial {
    /// A person: Ctrl-A X ends the machine.
    Person,
    /// Who only reads.
    Reader,
}

/// QEMU's arguments; it boots from the first drive. `more` are a person's, which come last and so win.
pub(crate) fn arguments(drives: &[Drive], serial: Serial, more: &[OsString]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
    // The guest may be hostile: whoever wants to know what happened to a machine boots it, too.
    add(&["-sandbox", "on,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-nodefaults", "-no-user-config", "-no-reboot", "-machine", "q35,graphics=off"]);
    // Of several accelerators the first that works is taken, but one that a person names would come last.
    if !more.iter().any(|word| word == "-accel") {
        add(&["-accel", "kvm", "-accel", "tcg"]);
    }
    add(&["-cpu", "max", "-smp", "2", "-m", &format!("{MEMORY_MIB}M"), "-device", "virtio-rng-pci"]);
    add(&["-nic", "none", "-vga", "std", "-display", "none"]);
    add(&["-serial", if serial == Serial::Person { "mon:stdio" } else { "stdio" }]);
    arguments.extend(drives.iter().enumerate().flat_map(|(number, drive)| drive.arguments(number)));
    arguments.extend(more.iter().cloned());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(device: &str) -> Drive {
        Drive { socket: "/tmp/a,b/0".into(), device: device.into(), disk: "5000c500a1b2c3d4".into() }
    }

    fn line(drives: &[Drive], serial: Serial, more: &[&str]) -> String {
        let more: Vec<OsString> = more.iter().map(OsString::from).collect();
        let words = arguments(drives, serial, &more);
        words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_machine_without_a_network() {
        insta::assert_snapshot!(line(&[drive("sda")], Serial::Person, &[]).replace(" -", "\n-"), @r#"
        -sandbox on,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
        -nodefaults
        -no-user-config
        -no-reboot
        -machine q35,graphics=off
        -accel kvm
        -accel tcg
        -cpu max
        -smp 2
        -m 2048M
        -device virtio-rng-pci
        -nic none
        -vga std
        -display none
        -serial mon:stdio
        -blockdev {"discard":"unmap","driver":"nbd","node-name":"disk0","server":{"path":"/tmp/a,b/0","type":"unix"}}
        -device ide-hd,bus=ide.0,drive=disk0,serial=5000c500a1b2c3d4,bootindex=0
        "#);
    }

    #[test]
    fn disks_hang_on_what_they_hung_on() {
        let drives = ["/dev/vda", "nvme0n1", "sdb", "xvda", "", "loop3", "sdg"].map(drive);
        let line = line(&drives, Serial::Reader, &[]);
        let of = |number: usize| {
            let (before, _) = line.split_once(&format!(",drive=disk{number},")).unwrap();
            before.rsplit(' ').next().unwrap()
        };
        let expected =
            ["virtio-blk-pci", "nvme", "ide-hd,bus=ide.2", "virtio-blk-pci", "nvme", "nvme", "nvme"];
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(of), expected);
        assert!(line.contains(" -serial stdio "), "{line}");
    }

    #[test]
    fn what_a_person_adds_comes_last_and_names_the_only_accelerator() {
        let line = line(&[drive("sda")], Serial::Person, &["-accel", "tcg", "-m", "8G"]);
        assert!(line.ends_with(" -accel tcg -m 8G") && !line.contains("kvm"), "{line}");
    }
}
