//! A loop that is stuck: systemd's watchdog ends the daemon and starts it again.

use std::fs;
use std::io;
use std::sync::mpsc;

use super::hosts::{Host, Pair};
use super::lab::wait_for;

/// Stops one thread for good, as a kernel that does not come back would.
fn stop_thread(tid: i32) {
    let (stopped, is_stopped) = mpsc::channel();
    // A tracer is a thread; this one must reap the other, or the process would never end.
    std::thread::spawn(move || {
        // SAFETY: ptrace(2) of a thread of another process; no memory of this process is given.
        let done = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) == 0
        };
        let error = io::Error::last_os_error();
        stopped.send(if done { Ok(()) } else { Err(error) }).unwrap();
        loop {
            let mut status = 0;
            // SAFETY: waitpid(2) writes one integer, which lives until it returns.
            let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
            if waited < 0 || libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
        }
    });
    is_stopped.recv().unwrap().expect("ptrace");
}

fn disk_thread(host: &Host, unit: &str) -> i32 {
    let pids = host.processes(unit);
    let tasks = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten());
    let mut tids = tasks.filter_map(|task| {
        let task = task.unwrap();
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        name.starts_with("disk-").then(|| task.file_name().to_string_lossy().parse().unwrap())
    });
    tids.next().expect("a disk's thread")
}

#[test]
fn a_stuck_loop_is_restarted_and_nothing_is_lost() {
    let pair = Pair::boot("watchdog");
    pair.configure();
    let hosts = [(&pair.agent, "blxrep-agent"), (&pair.dispatcher, "blxrep-dispatcher")];
    for (host, unit) in hosts {
        assert_ne!(host.unit(unit, "WatchdogUSec"), "0", "{unit} has a watchdog");
        let file = format!("/etc/systemd/system/{unit}.service.d/watchdog.conf");
        host.put(&file, "644", "[Service]\nWatchdogSec=3\n");
        host.run("systemctl daemon-reload");
    }
    pair.write();
    pair.start();
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 1, 180);
    }
    for (host, unit) in hosts {
        assert_eq!(host.unit(unit, "NRestarts"), "0", "fed while all is well");
        stop_thread(disk_thread(host, unit));
        wait_for("the watchdog to restart it", 60, || {
            host.unit(unit, "NRestarts") == "1" && host.unit(unit, "ActiveState") == "active"
        });
        let journal = host.run(&format!("journalctl -o cat -u {unit}"));
        assert!(journal.contains("stuck: the thread of ") && journal.contains("watchdog"), "{journal}");
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 2, 60);
        }
    }
    pair.agent.run("systemctl stop writers");
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }
}
