//! The agent's end of the freeze guard.
//!
//! [`Guard::spawn`] starts `blxrep freeze-guard` and hands it the file systems. The guard process freezes and thaws
//! ([`main`]); the agent keeps descriptors of the same file systems, and a thread that thaws through them the moment the
//! guard is gone. If both are killed at once, [`super::record`] is left.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recv, sendmsg, shutdown,
    socketpair,
};

pub use super::guard_process::main;
use super::guard_wire::{
    Command, MESSAGE_MAX_BYTES, MOUNTS_MAX, Reply, STATE_FAILED, STATE_FOREIGN, STATE_FROZEN, STATE_OPEN,
    STATE_THAWED,
};
use super::mounts::{self, Mount};

/// The hidden subcommand for which the binary must call [`main`].
pub const SUBCOMMAND: &str = "freeze-guard";
/// How long a guard may take to start on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// How long after its deadline, or after a command, a guard is waited for before the agent thaws by itself.
const GRACE: Duration = Duration::from_secs(3);

/// A freeze that did not come about, or a guard that failed. Nothing is frozen by us afterwards, but for
/// [`GuardError::Thaw`].
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The guard process cannot be started.
    #[error("the freeze guard cannot be started: {0}; it needs root, with CAP_SYS_ADMIN and CAP_IPC_LOCK")]
    Start(io::Error),
    /// A file system cannot be opened.
    #[error("{mount_point} cannot be opened: {source}")]
    Open {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// More file systems than one guard takes.
    #[error("{0} file systems are more than can be frozen at once ({MOUNTS_MAX})")]
    TooMany(usize),
    /// A file system failed to freeze.
    #[error("{mount_point} cannot be frozen: {source}; look at the kernel's log")]
    Freeze {
        /// Where it is mounted.
        mount_point: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The time was over before everything was frozen.
    #[error("the file systems did not freeze in time (a longer freeze-timeout may help)")]
    Expired,
    /// The guard died or does not answer; the agent has thawed what it froze.
    #[error("the freeze guard is gone; everything it froze was thawed")]
    Gone,
    /// Something may still be frozen.
    #[error("a file system cannot be thawed: {0}; thaw it with fsfreeze --unfreeze")]
    Thaw(io::Error),
}

/// What became of a file system that was to be frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeState {
    /// Frozen by us.
    Frozen,
    /// Somebody else has frozen it; it is not thawed by us.
    FrozenByAnother,
    /// Its type cannot be frozen (vfat, for one).
    NotSupported,
}

/// What a freeze has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeReport {
    /// Every file system, in the order given.
    pub mounts: Vec<(PathBuf, FreezeState)>,
}

/// What a thaw has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThawReport {
    /// Something was thawed before: the deadline, a signal, a dead guard or somebody else.
    pub expired: bool,
    /// From the freeze to the last thaw; zero where nothing was frozen.
    pub frozen_for: Duration,
}

/// What the agent and its watching thread hold.
struct Held {
    socket: OwnedFd,
    mounts: Vec<(Mount, OwnedFd, AtomicU8)>,
    /// Something may be frozen: thaw it if the guard goes.
    armed: AtomicBool,
    /// Tells the watching thread to end.
    quit: EventFd,
}

/// A running guard. Dropping it thaws.
pub struct Guard {
    held: Arc<Held>,
    child: Option<Child>,
    watcher: Option<JoinHandle<()>>,
    begin: Instant,
}

impl Guard {
    /// Starts a guard for these file systems (see [`super::topology::Topology::to_freeze`]); `exe` is the `blxrep` binary.
    ///
    /// # Errors
    /// When the process or the thread cannot be started, or a mount point does not lead to its file system.
    pub fn spawn(exe: &Path, mounts: &[Mount]) -> Result<Self, GuardError> {
        if mounts.len() > MOUNTS_MAX {
            return Err(GuardError::TooMany(mounts.len()));
        }
        let mut opened = Vec::with_capacity(mounts.len());
        for mount in mounts {
            let open = mount.open();
            let fd =
                open.map_err(|source| GuardError::Open { mount_point: mount.mount_point.clone(), source })?;
            opened.push((mount.clone(), fd, AtomicU8::new(STATE_OPEN)));
        }
        let start = |errno: Errno| GuardError::Start(errno.into());
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(start)?;
        let quit = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(start)?;
        let child = Process::new(exe)
            .arg(SUBCOMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(GuardError::Start)?;
        let held = Arc::new(Held { socket: ours, mounts: opened, armed: AtomicBool::new(false), quit });
        let mut guard = Self { held, child: Some(child), watcher: None, begin: Instant::now() };
        guard.hand_over()?;
        let held = Arc::clone(&guard.held);
        let watcher = thread::Builder::new().name("freeze-watch".to_owned()).spawn(move || held.watch());
        guard.watcher = Some(watcher.map_err(GuardError::Start)?);
        Ok(guard)
    }

    /// Waits for the guard to be ready and gives it the file systems.
    fn hand_over(&self) -> Result<(), GuardError> {
        let gone = || GuardError::Start(io::Error::other("it ended or does not answer"));
        let mut buffer = [0; MESSAGE_MAX_BYTES];
        match self.held.receive(&mut buffer, Instant::now() + START_TIMEOUT) {
            Some(Reply::Ready { errno: 0 }) => {}
            Some(Reply::Ready { errno }) => {
                return Err(GuardError::Start(io::Error::from_raw_os_error(errno)));
            }
            _ => return Err(gone()),
        }
        for (_, fd, _) in &self.held.mounts {
            self.held.send(Command::Mount, Some(fd)).map_err(|e| GuardError::Start(e.into()))?;
        }
        Ok(())
    }

    /// Freezes all file systems in their order; after `deadline` they are thawed whatever happens. Once in a
    /// guard's life.
    ///
    /// # Errors
    /// When a file system fails to freeze (those of [`FreezeState::FrozenByAnother`] and
    /// [`FreezeState::NotSupported`] are no failures), the time is over, or the guard is gone. Nothing of ours is
    /// frozen then.
    pub fn freeze(&mut self, deadline: Duration) -> Result<FreezeReport, GuardError> {
        self.begin = Instant::now();
        self.held.armed.store(true, SeqCst);
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let mut buffer = [0; MESSAGE_MAX_BYTES];
        let held = Arc::clone(&self.held);
        let until = self.begin.checked_add(deadline.saturating_add(GRACE)).unwrap_or(self.begin);
        let sent = held.send(Command::Freeze { deadline_ms }, None).is_ok();
        let answer = if sent { held.receive(&mut buffer, until) } else { None };
        let Some(Reply::Freeze { expired, errno, states }) = answer else {
            self.abandon();
            return Err(GuardError::Gone);
        };
        for ((_, _, to), from) in held.mounts.iter().zip(states) {
            to.store(*from, SeqCst);
        }
        if errno != 0 {
            let mount = held.mounts.iter().find(|(_, _, state)| state.load(SeqCst) == STATE_FAILED);
            let mount_point = mount.map(|(m, ..)| m.mount_point.clone()).unwrap_or_default();
            return Err(GuardError::Freeze { mount_point, source: io::Error::from_raw_os_error(errno) });
        }
        if expired {
            return Err(GuardError::Expired);
        }
        Ok(FreezeReport {
            mounts: held.mounts.iter().map(|(m, _, s)| (m.mount_point.clone(), state_of(s))).collect(),
        })
    }

    /// Whether everything that was frozen still is, by the word of the kernel. False if the guard does not answer.
    pub fn still_frozen(&mut self) -> bool {
        let mut buffer = [0; MESSAGE_MAX_BYTES];
        self.held.armed.load(SeqCst)
            && self.held.send(Command::Still, None).is_ok()
            && self.held.receive(&mut buffer, Instant::now() + GRACE) == Some(Reply::Still(true))
    }

    /// Thaws all that this guard froze.
    ///
    /// # Errors
    /// [`GuardError::Thaw`] when the kernel refuses to thaw. A guard that is gone is no error: then the agent has
    /// thawed, and the report says `expired`.
    pub fn thaw(&mut self) -> Result<ThawReport, GuardError> {
        let mut buffer = [0; MESSAGE_MAX_BYTES];
        let held = Arc::clone(&self.held);
        let sent = held.send(Command::Thaw, None).is_ok();
        let answer = if sent { held.receive(&mut buffer, Instant::now() + GRACE) } else { None };
        match answer {
            Some(Reply::Thaw { errno: 0, expired, frozen_us }) => {
                held.armed.store(false, SeqCst);
                Ok(ThawReport { expired, frozen_for: Duration::from_micros(frozen_us) })
            }
            Some(Reply::Thaw { errno, .. }) => {
                held.thaw_here().map_err(|_| GuardError::Thaw(io::Error::from_raw_os_error(errno)))?;
                held.armed.store(false, SeqCst);
                Ok(ThawReport { expired: true, frozen_for: self.begin.elapsed() })
            }
            _ => {
                self.abandon();
                held.thaw_here().map_err(|e| GuardError::Thaw(e.into()))?;
                Ok(ThawReport { expired: true, frozen_for: self.begin.elapsed() })
            }
        }
    }

    /// Thaws without the guard, which is dead or does not answer, and gets rid of it.
    ///
    /// Each file system by a thread of its own, because the kernel can make a thaw wait for a freeze that is going on. A
    /// guard inside such a freeze dies only when the kernel lets it go: then the watching thread thaws once more.
    fn abandon(&mut self) {
        let until = Instant::now() + GRACE;
        let mut threads = Vec::new();
        for index in 0..self.held.mounts.len() {
            let held = Arc::clone(&self.held);
            threads.extend(thread::Builder::new().spawn(move || held.thaw_index(index)).ok());
        }
        while threads.iter().any(|t| !t.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            if !exited(&mut child, until) {
                thread::Builder::new().spawn(move || child.wait()).ok();
                // Not told to quit, it goes on watching.
                self.watcher = None;
            }
        }
    }

    /// The guard's process id, for tests and logs; `None` once it was given up.
    pub fn process_id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The guard takes the end of file for our death: it thaws and ends.
        shutdown(self.held.socket.as_raw_fd(), Shutdown::Write).ok();
        let until = Instant::now() + GRACE;
        if self.child.as_mut().is_some_and(|child| !exited(child, until)) {
            self.abandon();
        }
        if let Some(watcher) = self.watcher.take() {
            self.held.quit.write(1).ok();
            watcher.join().ok();
        }
    }
}

/// Waits for a process, but not longer than `until`.
fn exited(child: &mut Child, until: Instant) -> bool {
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(1)),
            Ok(None) => return false,
            _ => return true,
        }
    }
}

fn state_of(state: &AtomicU8) -> FreezeState {
    match state.load(SeqCst) {
        STATE_FROZEN => FreezeState::Frozen,
        STATE_FOREIGN => FreezeState::FrozenByAnother,
        _ => FreezeState::NotSupported,
    }
}

impl Held {
    fn send(&self, command: Command, fd: Option<&OwnedFd>) -> nix::Result<()> {
        let (bytes, len) = command.encode();
        let parts = [IoSlice::new(bytes.get(..len).unwrap_or_default())];
        let raw: Vec<_> = fd.map(AsRawFd::as_raw_fd).into_iter().collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    /// The next message; `None` at the end of file, at `until`, or if it is none.
    fn receive<'a>(&self, buffer: &'a mut [u8; MESSAGE_MAX_BYTES], until: Instant) -> Option<Reply<'a>> {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(Errno::EINTR) => return self.receive(buffer, until),
            Ok(1..) => {}
            _ => return None,
        }
        let len = recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).ok()?;
        Reply::decode(buffer.get(..len)?)
    }

    /// The watching thread: thaws the moment the guard is gone.
    fn watch(&self) {
        loop {
            let mut fds = [
                // Hang-ups are told without being asked for; messages are for the other thread.
                PollFd::new(self.socket.as_fd(), PollFlags::empty()),
                PollFd::new(self.quit.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            let [gone, quit] = fds.map(|fd| fd.any().unwrap_or(true));
            if gone && self.armed.load(SeqCst) {
                self.thaw_here().ok();
            }
            if gone || quit {
                return;
            }
        }
    }

    /// Thaws from here what the guard froze, or may have frozen before it died; in reverse.
    fn thaw_here(&self) -> nix::Result<()> {
        let mut result = Ok(());
        for index in (0..self.mounts.len()).rev() {
            // One that cannot be thawed is no reason to leave the others.
            result = self.thaw_index(index).and(result);
        }
        result
    }

    fn thaw_index(&self, index: usize) -> nix::Result<()> {
        let Some((_, fd, state)) = self.mounts.get(index) else { return Ok(()) };
        if !matches!(state.load(SeqCst), STATE_OPEN | STATE_FROZEN) {
            return Ok(());
        }
        match mounts::thaw(fd.as_fd()) {
            Ok(()) | Err(Errno::EINVAL) => {
                state.store(STATE_THAWED, SeqCst);
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }
}
