//! What a machine is: for the dispatcher's catalogue, and for the person who restores it elsewhere.
//!
//! Only real values: what cannot be found out is empty, and `problems` says why. Collecting is bounded in time and size.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::sys::socket::SockaddrStorage;
use nix::sys::utsname::uname;
use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use crate::command::ask;
pub use crate::lsblk::BlockDevice;
use crate::lsblk::{COLUMNS, COLUMNS_OLD, complete, parse_lsblk, sane};

/// lsblk waits for udev and can meet a disk that does not answer.
const LSBLK_TIMEOUT: Duration = Duration::from_secs(20);
/// For each device.
const BLKID_TIMEOUT: Duration = Duration::from_secs(5);
/// For all devices together.
const BLKID_ALL_TIMEOUT: Duration = Duration::from_secs(30);
const LSBLK_MAX_BYTES: usize = 4 << 20;
const BLKID_MAX_BYTES: usize = 64 << 10;
/// More than this is a container host with its virtual interfaces: what matters is among the first.
const INTERFACES_MAX: usize = 256;
const ADDRESSES_MAX: usize = 64;

/// A machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// The host's name.
    pub hostname: String,
    /// `/etc/machine-id`, if there is one.
    pub machine_id: Option<String>,
    /// The system's name for people, such as `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
    /// The kernel's release, such as `6.1.0-18-amd64`.
    pub kernel: String,
    /// The architecture, such as `x86_64`.
    pub architecture: String,
    /// The processor's model; empty where the kernel does not name one.
    pub cpu_model: String,
    /// Processors in use.
    pub cpu_count: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The network interfaces.
    pub interfaces: Vec<Interface>,
    /// The disks with all that lies on them.
    pub disks: Vec<BlockDevice>,
    /// What could not be found out, and why.
    pub problems: Vec<String>,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The name, such as `eth0`.
    pub name: String,
    /// The hardware address, `xx:xx:xx:xx:xx:xx`, if it has one.
    pub mac: Option<String>,
    /// The addresses with their prefix lengths, such as `192.0.2.7/24`.
    pub addresses: Vec<String>,
}

/// Looks at this machine. Takes up to a minute where disks do not answer, else far less than a second.
pub fn collect() -> Footprint {
    let mut problems = Vec::new();
    let mut print = Footprint::default();
    match uname() {
        Ok(name) => {
            let text = |s: &std::ffi::OsStr| sane(&s.to_string_lossy()).unwrap_or_default();
            print.hostname = text(name.nodename());
            print.kernel = text(name.release());
            print.architecture = text(name.machine());
        }
        Err(e) => problems.push(format!("uname: {e}")),
    }
    print.machine_id = fs::read_to_string("/etc/machine-id").ok().and_then(|id| sane(&id));
    let releases = ["/etc/os-release", "/usr/lib/os-release"];
    let release = releases.iter().find_map(|path| fs::read_to_string(path).ok());
    print.os = release.and_then(|text| pretty_name(&text)).unwrap_or_default();
    print.cpu_model =
        fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| cpu_model(&text)).unwrap_or_default();
    let count = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
    print.cpu_count = count.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    print.memory_bytes =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory_bytes(&text)).unwrap_or(0);
    match getifaddrs() {
        Ok(list) => print.interfaces = interfaces(list),
        Err(e) => problems.push(format!("the network interfaces: {e}")),
    }
    print.disks = disks(&mut problems);
    print.problems = problems.iter().filter_map(|p| sane(p)).collect();
    print
}

/// PRETTY_NAME of os-release(5).
fn pretty_name(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    sane(value.trim().trim_matches(['"', '\'']))
}

/// The first `model name` (x86), or `cpu model`, `Model`, `cpu` elsewhere.
fn cpu_model(cpuinfo: &str) -> Option<String> {
    let value = |key: &str| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(name, _)| name.trim() == key).and_then(|(_, value)| sane(value))
    };
    ["model name", "cpu model", "Model", "cpu"].into_iter().find_map(value)
}

fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn interfaces(list: impl Iterator<Item = InterfaceAddress>) -> Vec<Interface> {
    let mut found: BTreeMap<String, Interface> = BTreeMap::new();
    for item in list {
        let Some(name) = sane(&item.interface_name) else { continue };
        if !found.contains_key(&name) && found.len() >= INTERFACES_MAX {
            continue;
        }
        let interface =
            found.entry(name.clone()).or_insert_with(|| Interface { name, ..Interface::default() });
        let Some(address) = item.address else { continue };
        if let Some(mac) = address.as_link_addr().and_then(|link| link.addr()).filter(|mac| *mac != [0; 6]) {
            interface.mac = Some(mac.map(|byte| format!("{byte:02x}")).join(":"));
        }
        if let Some(ip) = ip_of(&address).filter(|_| interface.addresses.len() < ADDRESSES_MAX) {
            let prefix = item.netmask.as_ref().and_then(ip_of).map(prefix_len);
            interface.addresses.push(prefix.map_or_else(|| ip.to_string(), |len| format!("{ip}/{len}")));
        }
    }
    found.into_values().collect()
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
}

fn prefix_len(mask: IpAddr) -> u32 {
    match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones(),
        IpAddr::V6(mask) => mask.to_bits().leading_ones(),
    }
}

/// All block devices, by lsblk, completed by blkid.
fn disks(problems: &mut Vec<String>) -> Vec<BlockDevice> {
    let list = |columns| {
        let (status, out) = ask(
            "lsblk",
            &["--json", "--bytes", "--output", columns],
            Stdio::null(),
            LSBLK_TIMEOUT,
            LSBLK_MAX_BYTES,
        )?;
        // It ends with a failure of 32 or 64 where some devices could not be looked at: the others count.
        parse_lsblk(&out)
            .ok_or_else(|| std::io::Error::other(format!("lsblk ended with {status} and no list of disks")))
    };
    match list(COLUMNS).or_else(|_| list(COLUMNS_OLD)) {
        Ok(mut disks) => {
            probe(&mut disks, Instant::now() + BLKID_ALL_TIMEOUT, problems);
            disks
        }
        Err(e) => {
            problems.push(format!("the disks: {e}; is util-linux installed?"));
            Vec::new()
        }
    }
}

/// Asks blkid about each device of which lsblk does not say what is on it.
fn probe(devices: &mut [BlockDevice], until: Instant, problems: &mut Vec<String>) {
    for device in devices {
        if device.fs_type.is_none() && device.size_bytes > 0 && device.path.starts_with("/dev/") {
            let left = until.saturating_duration_since(Instant::now()).min(BLKID_TIMEOUT);
            match ask("blkid", &["-p", "-o", "export", &device.path], Stdio::null(), left, BLKID_MAX_BYTES) {
                Ok((_, out)) => complete(device, &out),
                Err(e) => problems.push(format!("{}: {e}", device.path)),
            }
        }
        probe(&mut device.children, until, problems);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_real_values() {
        let print = collect();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(print.hostname, host.trim());
        assert_eq!(print.kernel, fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
        assert!(print.cpu_count > 0 && print.memory_bytes > 64 << 20 && !print.architecture.is_empty());
        let loopback = print.interfaces.iter().find(|i| i.name == "lo").unwrap();
        assert!(loopback.addresses.contains(&"127.0.0.1/8".to_owned()), "{loopback:?}");
        let listed = fs::read_dir("/sys/block").unwrap().filter(|e| {
            let size = fs::read_to_string(e.as_ref().unwrap().path().join("size")).unwrap_or_default();
            !size.trim().is_empty() && size.trim() != "0"
        });
        assert!(listed.count() == 0 || !print.disks.is_empty(), "{:?}", print.problems);
        let json = serde_json::to_string(&print).unwrap();
        assert_eq!(serde_json::from_str::<Footprint>(&json).unwrap(), print);
    }

    #[test]
    fn texts_of_the_system_are_understood() {
        assert_eq!(pretty_name("ID=x\nPRETTY_NAME=\"Some OS 1\"\n").as_deref(), Some("Some OS 1"));
        assert_eq!(pretty_name("ID=x\n"), None);
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: Fast CPU: 1\n").as_deref(), Some("Fast CPU: 1"));
        assert_eq!(cpu_model("processor\t: 0\n"), None);
        assert_eq!(memory_bytes("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        assert_eq!(memory_bytes("MemTotal: lots kB\n"), None);
        assert_eq!(prefix_len("255.255.240.0".parse().unwrap()), 20);
        assert_eq!(prefix_len("ffff:ffff::".parse().unwrap()), 32);
    }
}
