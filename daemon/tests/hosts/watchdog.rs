//! A loop that is stuck: systemd's watchdog ends the daemon and starts it again.

use std::fs;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::hosts::{Host, Pair};
use super::lab::wait_for;

/// A thread that stands still, as in a kernel that does not come back, until this is dropped.
struct Stuck {
    let_go: Option<mpsc::Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Stuck {
    fn new(tid: i32) -> Self {
        let (stopped, is_stopped) = mpsc::channel();
        let (let_go, told) = mpsc::channel();
        // A tracer is a thread; this one must reap the other, or the process would never end.
        let tracer = thread::spawn(move || {
            // SAFETY: ptrace(2) of a thread of another process; no memory of this process is given.
            let done = unsafe {
                libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) == 0
                    && libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) == 0
            };
            let error = io::Error::last_os_error();
            stopped.send(if done { Ok(()) } else { Err(error) }).unwrap();
            while !ended(tid) {
                if told.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Disconnected) {
                    // SAFETY: as above. It fails if the thread is gone.
                    unsafe { libc::ptrace(libc::PTRACE_DETACH, tid, 0, 0) };
                    break;
                }
            }
        });
        is_stopped.recv().unwrap().expect("ptrace");
        Self { let_go: Some(let_go), tracer: Some(tracer) }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        drop(self.let_go.take());
        let _ = self.tracer.take().unwrap().join();
    }
}

/// Whether a traced thread is gone, which this reaps.
fn ended(tid: i32) -> bool {
    let mut status = 0;
    // SAFETY: waitpid(2) writes one integer, which lives until it returns.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    waited < 0 || (waited == tid && (libc::WIFEXITED(status) || libc::WIFSIGNALED(status)))
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

/// Stops a disk's thread. One that is met in what may wait for a slow disk (a freeze, a start) is not late for minutes: it goes on then,
/// and is stopped at another moment.
fn until_it_is_noticed(host: &Host, unit: &str) -> Stuck {
    for _ in 0..10 {
        let stuck = Stuck::new(disk_thread(host, unit));
        let end = Instant::now() + Duration::from_secs(8);
        while Instant::now() < end {
            let journal = host.run(&format!("journalctl -o cat -u {unit}"));
            if journal.contains("stuck: the thread of ") && journal.contains("watchdog") {
                return stuck;
            }
            thread::sleep(Duration::from_millis(200));
        }
        drop(stuck);
        thread::sleep(Duration::from_millis(700));
    }
    panic!("{unit}: a thread that stands still is not noticed");
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
        let _stuck = until_it_is_noticed(host, unit);
        wait_for("the watchdog to restart it", 60, || {
            host.unit(unit, "NRestarts") == "1" && host.unit(unit, "ActiveState") == "active"
        });
        for disk in pair.disks() {
            pair.more_checkpoints(disk, 2, 60);
        }
    }
    pair.agent.run("systemctl stop writers");
    for disk in pair.disks() {
        pair.compare_newest(disk, 1);
    }
}
