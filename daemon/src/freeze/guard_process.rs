//! The freeze guard: a process of its own that freezes and thaws.
//!
//! `blxrep` runs itself again with the one argument `freeze-guard`; standard input is a Unix socket of packets to the
//! agent ([`super::guard_wire`]). The guard thaws what it froze when it is told to, when the agent's end of the
//! socket is closed (the agent died), when the deadline has passed on its own clock, and on SIGTERM, SIGINT and SIGHUP.
//!
//! One thread asks the kernel to freeze, because that can wait for long; the other one keeps the deadline and
//! thaws meanwhile. A state in [`Frozen::states`] says for each file system who may thaw it, so it happens exactly once.
//!
//! What must never happen here while something is frozen: allocating, logging, touching a file, ending without
//! having thawed.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};

use super::guard_wire::{
    Command, MESSAGE_MAX_BYTES, MOUNTS_MAX, Reply, STATE_FAILED, STATE_FOREIGN, STATE_FROZEN, STATE_OPEN,
    STATE_THAWED, STATE_UNSUPPORTED,
};
use super::mounts;

/// Nothing to do for the freezing thread.
const JOB_NONE: u8 = 0;
const JOB_FREEZE: u8 = 1;
const JOB_PROBE: u8 = 2;
const JOB_QUIT: u8 = 3;
/// Enough for the freezing thread, and little to lock.
const STACK_BYTES: usize = 256 << 10;

/// The whole life of the guard. Call it first thing for the argument `freeze-guard`, before anything else is started.
pub fn main() -> ExitCode {
    let stdin = std::io::stdin();
    match prepare().and_then(|signals| serve(stdin.as_fd(), &signals)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => {
            reply(stdin.as_fd(), Reply::Ready { errno: errno as i32 });
            ExitCode::FAILURE
        }
    }
}

/// Leaves the terminal's session, hides from the OOM killer, locks memory and takes signals into its own hands.
fn prepare() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|s| signals.add(s));
    signals.thread_block()?;
    // Fails only for the leader of a process group: then somebody called it by hand and it is no leader of ours.
    nix::unistd::setsid().ok();
    // Not everybody may; the agent thaws if the guard is killed.
    std::fs::write("/proc/self/oom_score_adj", "-1000").ok();
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Takes the file systems, then freezes and thaws on command.
fn serve(socket: BorrowedFd<'_>, signals: &SignalFd) -> nix::Result<()> {
    reply(socket, Reply::Ready { errno: 0 });
    let Some((fds, deadline_ms)) = receive_mounts(socket)? else { return Ok(()) };
    let shared = Frozen::new(fds)?;
    thread::scope(|scope| {
        let worker = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || shared.work());
        let worker = worker.map_err(|_| Errno::EAGAIN)?;
        let mut server = Server {
            socket,
            shared: &shared,
            worker: worker.thread(),
            deadline: None,
            expired: false,
            owed: Owed::Nothing,
        };
        server.freeze(deadline_ms);
        let result = server.run(signals);
        // Not a step out of here before everything is thawed, the freezing thread's last catch included.
        shared.thaw_all();
        server.give(JOB_QUIT);
        result
    })
}

/// The descriptors of the file systems, and the deadline of the command that ends the list; `None` if the agent left.
fn receive_mounts(socket: BorrowedFd<'_>) -> nix::Result<Option<(Vec<OwnedFd>, u64)>> {
    let mut fds = Vec::new();
    loop {
        let mut buffer = [0; 16];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let len = message.bytes;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        match Command::decode(buffer.get(..len).unwrap_or_default()) {
            Some(Command::Mount) if fds.len() <= MOUNTS_MAX => {}
            Some(Command::Freeze { deadline_ms }) => return Ok(Some((fds, deadline_ms))),
            _ if len == 0 => return Ok(None),
            _ => return Err(Errno::EPROTO),
        }
    }
}

/// What both threads share.
struct Frozen {
    fds: Vec<OwnedFd>,
    /// One for each file system. Only who moves it from [`STATE_FROZEN`] to [`STATE_THAWED`] thaws.
    states: Vec<AtomicU8>,
    /// Nothing may stay frozen from now on.
    stop: AtomicBool,
    /// Somebody else thawed something of ours.
    lost: AtomicBool,
    job: AtomicU8,
    /// Told when a job is done.
    done: EventFd,
    freeze_errno: AtomicI32,
    thaw_errno: AtomicI32,
    begin: Instant,
    /// Microseconds from `begin` to the newest thaw.
    thawed_us: AtomicU64,
}

impl Frozen {
    fn new(fds: Vec<OwnedFd>) -> nix::Result<Self> {
        Ok(Self {
            states: fds.iter().map(|_| AtomicU8::new(STATE_OPEN)).collect(),
            fds,
            stop: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            job: AtomicU8::new(JOB_NONE),
            done: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            freeze_errno: AtomicI32::new(0),
            thaw_errno: AtomicI32::new(0),
            begin: Instant::now(),
            thawed_us: AtomicU64::new(0),
        })
    }

    fn each(&self) -> impl DoubleEndedIterator<Item = (&OwnedFd, &AtomicU8)> {
        self.fds.iter().zip(&self.states)
    }

    /// The freezing thread.
    fn work(&self) {
        loop {
            match self.job.swap(JOB_NONE, SeqCst) {
                JOB_FREEZE => self.freeze_all(),
                JOB_PROBE => self.probe_all(),
                JOB_QUIT => return,
                _ => {
                    thread::park();
                    continue;
                }
            }
            self.done.write(1).ok();
        }
    }

    fn freeze_all(&self) {
        for (fd, state) in self.each() {
            if self.stop.load(SeqCst) {
                return;
            }
            match mounts::freeze(fd.as_fd()) {
                Ok(()) => self.settle(fd, state),
                Err(Errno::EBUSY) => state.store(STATE_FOREIGN, SeqCst),
                Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => state.store(STATE_UNSUPPORTED, SeqCst),
                Err(errno) => {
                    state.store(STATE_FAILED, SeqCst);
                    self.freeze_errno.store(errno as i32, SeqCst);
                    return self.thaw_all();
                }
            }
        }
    }

    /// Hands a file system just found frozen to whoever thaws. If the others were thawed in the meantime, this
    /// one is thawed at once: `stop` is set before they are looked through, so one of the two sees the other.
    fn settle(&self, fd: &OwnedFd, state: &AtomicU8) {
        state.store(STATE_FROZEN, SeqCst);
        if self.stop.load(SeqCst) {
            self.thaw_one(fd, state);
        }
    }

    /// Freezing what is frozen is refused with EBUSY: the only way to learn from the kernel that it still is.
    fn probe_all(&self) {
        for (fd, state) in self.each() {
            if state.compare_exchange(STATE_FROZEN, STATE_OPEN, SeqCst, SeqCst).is_err() {
                continue;
            }
            let seen = mounts::freeze(fd.as_fd());
            self.lost.fetch_or(seen != Err(Errno::EBUSY), SeqCst);
            self.settle(fd, state);
        }
    }

    /// Thaws what is frozen, in reverse; what the other thread works on right now it thaws itself.
    fn thaw_all(&self) {
        self.stop.store(true, SeqCst);
        self.each().rev().for_each(|(fd, state)| self.thaw_one(fd, state));
    }

    fn thaw_one(&self, fd: &OwnedFd, state: &AtomicU8) {
        if state.compare_exchange(STATE_FROZEN, STATE_THAWED, SeqCst, SeqCst).is_err() {
            return;
        }
        match mounts::thaw(fd.as_fd()) {
            Ok(()) => {}
            Err(Errno::EINVAL) => self.lost.store(true, SeqCst),
            Err(errno) => self.thaw_errno.store(errno as i32, SeqCst),
        }
        let us = u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.thawed_us.fetch_max(us, SeqCst);
    }
}

/// The answer that waits for the freezing thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    Freeze,
    Still,
    Thaw,
}

/// The thread that listens and keeps the deadline.
struct Server<'a> {
    socket: BorrowedFd<'a>,
    shared: &'a Frozen,
    worker: &'a thread::Thread,
    deadline: Option<Instant>,
    /// Thawed before it was told to.
    expired: bool,
    owed: Owed,
}

impl Server<'_> {
    /// Until the agent leaves.
    fn run(&mut self, signals: &SignalFd) -> nix::Result<()> {
        loop {
            let mut fds = [self.socket, signals.as_fd(), self.shared.done.as_fd()]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, self.timeout()) {
                Err(Errno::EINTR) | Ok(_) => {}
                Err(errno) => return Err(errno),
            }
            let [socket, signal, done] = fds.map(|fd| fd.any().unwrap_or(true));
            if self.deadline.is_some_and(|at| Instant::now() >= at) {
                self.expire();
            }
            if signal && signals.read_signal().is_ok_and(|s| s.is_some()) {
                self.expire();
            }
            if done && self.shared.done.read().is_ok() {
                self.answer();
            }
            if socket && !self.listen()? {
                return Ok(());
            }
        }
    }

    fn timeout(&self) -> PollTimeout {
        let Some(at) = self.deadline else { return PollTimeout::NONE };
        // A millisecond more, so that it has really passed when poll(2) returns.
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn expire(&mut self) {
        self.deadline = None;
        self.expired = true;
        self.shared.thaw_all();
    }

    fn give(&self, job: u8) {
        self.shared.job.store(job, SeqCst);
        self.worker.unpark();
    }

    fn freeze(&mut self, deadline_ms: u64) {
        let now = Instant::now();
        // A deadline too far away to be a time is none that anybody can have meant.
        self.deadline = Some(now.checked_add(Duration::from_millis(deadline_ms)).unwrap_or(now));
        self.owed = Owed::Freeze;
        self.give(JOB_FREEZE);
    }

    /// One message; false when the agent has left.
    fn listen(&mut self) -> nix::Result<bool> {
        let mut buffer = [0; 16];
        let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(false),
            Ok(len) => len,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(true),
            Err(errno) => return Err(errno),
        };
        match Command::decode(buffer.get(..len).unwrap_or_default()) {
            Some(Command::Still) if self.owed == Owed::Nothing => {
                self.owed = Owed::Still;
                self.give(JOB_PROBE);
                Ok(true)
            }
            Some(Command::Thaw) => {
                let busy = self.owed != Owed::Nothing;
                self.owed = Owed::Thaw;
                self.deadline = None;
                self.shared.thaw_all();
                if !busy {
                    self.answer();
                }
                Ok(true)
            }
            _ => Err(Errno::EPROTO),
        }
    }

    /// Gives the answer that is owed, now that the freezing thread rests.
    fn answer(&mut self) {
        let shared = self.shared;
        let expired = self.expired || shared.lost.load(SeqCst);
        let mut states = [STATE_OPEN; MOUNTS_MAX];
        let message = match std::mem::replace(&mut self.owed, Owed::Nothing) {
            Owed::Nothing => return,
            Owed::Freeze => {
                states.iter_mut().zip(&shared.states).for_each(|(to, from)| *to = from.load(SeqCst));
                let states = states.get(..shared.states.len()).unwrap_or_default();
                Reply::Freeze { expired, errno: shared.freeze_errno.load(SeqCst), states }
            }
            Owed::Still => Reply::Still(!expired),
            Owed::Thaw => Reply::Thaw {
                expired,
                errno: shared.thaw_errno.load(SeqCst),
                frozen_us: shared.thawed_us.load(SeqCst),
            },
        };
        reply(self.socket, message);
    }
}

/// Says something to the agent. If it is not there any more, the end of file on the socket will tell.
fn reply(socket: BorrowedFd<'_>, message: Reply<'_>) {
    let mut buffer = [0; MESSAGE_MAX_BYTES];
    let len = message.encode(&mut buffer);
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    send(socket.as_raw_fd(), buffer.get(..len).unwrap_or_default(), flags).ok();
}
