//! Hooks: programs of the administrator that prepare applications for a freeze.
//!
//! Every executable of a directory is run in the order of the names, with the stage as its one argument. What must
//! never happen here: waiting for a hook, or for anything it has started, longer than its time.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};

/// How much of a hook's output is kept.
const OUTPUT_KEPT_BYTES: usize = 4096;
/// How long a killed hook is waited for. In the frozen stage it may hang in a write, where not even SIGKILL ends it.
const KILLED_WAIT: Duration = Duration::from_millis(200);
/// More programs than this in a hooks directory are taken for a mistake.
const HOOKS_MAX: usize = 256;

/// When a hook is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before the file systems are frozen.
    PreFreeze,
    /// While they are frozen, after the last block was read.
    Frozen,
    /// After they were thawed, or after it was found that they could not be frozen.
    PostThaw,
}

impl Stage {
    /// The argument for the hook.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreFreeze => "pre-freeze",
            Self::Frozen => "frozen",
            Self::PostThaw => "post-thaw",
        }
    }
}

/// What hooks find in their environment.
#[derive(Debug, Clone)]
pub struct HookEnv {
    /// `BLXREP_AGENT`: the agent's id.
    pub agent: String,
    /// `BLXREP_DEVICE`: the disk's path.
    pub device_path: PathBuf,
    /// `BLXREP_CHECKPOINT`: the checkpoint's id; before the freeze the one it will probably have.
    pub checkpoint: String,
}

/// How long hooks may take.
#[derive(Debug, Clone, Copy)]
pub struct HookLimits {
    /// Each of them.
    pub each: Duration,
    /// All of them: none goes on after this. In the frozen stage, the end of the freeze.
    pub until: Option<Instant>,
}

/// What the hooks of one stage did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HookReport {
    /// How many were started.
    pub ran: usize,
    /// One sentence for each that failed, hung, or was refused.
    pub failed: Vec<String>,
    /// For the log: the name of each hook that said something, and the end of it (4 KiB at most).
    pub output: Vec<(String, String)>,
}

/// Runs the hooks of a directory; one that is not there, or `None`, holds no hooks. Nothing a hook does is an error here.
///
/// A program (or directory) that somebody else than root could change is refused, and so said in `failed`.
pub fn run_hooks(dir: Option<&Path>, stage: Stage, env: &HookEnv, limits: HookLimits) -> HookReport {
    let mut report = HookReport::default();
    let Some(dir) = dir else { return report };
    match hooks_in(dir, &mut report.failed) {
        Ok(hooks) => hooks.iter().for_each(|hook| run_one(hook, stage, env, limits, &mut report)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => report.failed.push(format!("the hooks in {} cannot be read: {e}", dir.display())),
    }
    report
}

/// The executables of the directory in the order of their names.
fn hooks_in(dir: &Path, refused: &mut Vec<String>) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?;
    paths.sort();
    let mut hooks = Vec::new();
    for path in paths {
        // A link is followed: that is how whole directories of hooks are kept elsewhere (NixOS).
        let Ok(meta) = fs::metadata(&path) else { continue };
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            continue;
        }
        match changeable_by_others(&path) {
            Ok(None) if hooks.len() < HOOKS_MAX => hooks.push(path),
            Ok(None) => refused.push(format!("hook {}: not run, more than {HOOKS_MAX}", name_of(&path))),
            Ok(Some(what)) => {
                let what = what.display();
                refused.push(format!("hook {}: refused, others than root can change {what}", name_of(&path)));
            }
            Err(e) => refused.push(format!("hook {}: refused, {e}", name_of(&path))),
        }
    }
    Ok(hooks)
}

/// What on the way to this program can be changed or exchanged by somebody else than root: both where its name is
/// and where a link leads.
fn changeable_by_others(path: &Path) -> io::Result<Option<PathBuf>> {
    let real = fs::canonicalize(path)?;
    if open_to_others(&fs::metadata(&real)?, false) {
        return Ok(Some(real));
    }
    let named = path.parent().map(fs::canonicalize).transpose()?;
    let dirs = real.ancestors().skip(1).chain(named.iter().flat_map(|dir| dir.ancestors()));
    for dir in dirs {
        if open_to_others(&fs::metadata(dir)?, true) {
            return Ok(Some(dir.to_owned()));
        }
    }
    Ok(None)
}

fn open_to_others(meta: &Metadata, sticky_helps: bool) -> bool {
    let writable = meta.mode() & 0o022 != 0;
    // In a sticky directory others can add, but not exchange what is root's.
    meta.uid() != 0 || (writable && !(sticky_helps && meta.mode() & 0o1000 != 0))
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().chars().take(80).collect()
}

fn run_one(hook: &Path, stage: Stage, env: &HookEnv, limits: HookLimits, report: &mut HookReport) {
    let name = name_of(hook);
    let now = Instant::now();
    let own = now.checked_add(limits.each).unwrap_or(now);
    let until = limits.until.map_or(own, |all| all.min(own));
    if now >= until {
        report.failed.push(format!("hook {name} ({}): not run, no time was left", stage.as_str()));
        return;
    }
    report.ran += 1;
    let (result, output) = match Running::start(hook, stage, env) {
        Ok(mut running) => (running.finish(until), running.output()),
        Err(e) => (Err(format!("cannot be started: {e}")), String::new()),
    };
    if let Err(why) = result {
        report.failed.push(format!("hook {name} ({}): {why}", stage.as_str()));
    }
    if !output.is_empty() {
        report.output.push((name, output));
    }
}

/// A hook that runs.
struct Running {
    child: Option<Child>,
    process: OwnedFd,
    pipe: File,
    pipe_open: bool,
    /// The newest bytes of the output, never more than twice what is kept.
    tail: Vec<u8>,
}

impl Running {
    fn start(hook: &Path, stage: Stage, env: &HookEnv) -> io::Result<Self> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut child = Command::new(hook)
            .arg(stage.as_str())
            .env("BLXREP_AGENT", &env.agent)
            .env("BLXREP_DEVICE", &env.device_path)
            .env("BLXREP_CHECKPOINT", &env.checkpoint)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::from(theirs.try_clone()?))
            .stderr(Stdio::from(theirs))
            .spawn()?;
        match pidfd(child.id()) {
            Ok(process) => {
                let tail = Vec::with_capacity(2 * OUTPUT_KEPT_BYTES);
                Ok(Self { child: Some(child), process, pipe: File::from(ours), pipe_open: true, tail })
            }
            Err(e) => {
                child.kill().ok();
                child.wait().ok();
                Err(e)
            }
        }
    }

    /// Waits for the end, and makes it one at `until`.
    fn finish(&mut self, until: Instant) -> Result<(), String> {
        let begin = Instant::now();
        let ended = self.wait(until);
        let what = format!("did not end within {} ms", begin.elapsed().as_millis());
        match ended {
            // On a busy machine this may be noticed when the guard has thawed: what the hook did may be behind the freeze.
            Some(_) if Instant::now() > until => return Err(format!("ended too late, it {what}")),
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(status_text(status)),
            None => {}
        }
        let what = format!("killed, it {what}");
        if let Some(group) = self.child.as_ref().and_then(|c| i32::try_from(c.id()).ok()) {
            killpg(Pid::from_raw(group), Signal::SIGKILL).ok();
        }
        if self.wait(Instant::now() + KILLED_WAIT).is_none()
            && let Some(mut child) = self.child.take()
        {
            // Somebody has to take note of its end, but not we.
            std::thread::Builder::new().spawn(move || child.wait()).ok();
        }
        Err(what)
    }

    /// Takes its output until it ends; `None` if it has not ended at `until`. What its own children still
    /// hold open is not waited for.
    fn wait(&mut self, until: Instant) -> Option<ExitStatus> {
        loop {
            self.drain();
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                self.drain();
                self.child = None;
                return Some(status);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let process = PollFd::new(self.process.as_fd(), PollFlags::POLLIN);
            let polled = match self.pipe_open {
                true => poll(&mut [process, PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)], timeout),
                false => poll(&mut [process], timeout),
            };
            if polled.is_err_and(|errno| errno != Errno::EINTR) {
                return None;
            }
        }
    }

    /// Takes what is in the pipe, but not for ever: a hook may write faster than is read.
    fn drain(&mut self) {
        let mut buffer = [0; OUTPUT_KEPT_BYTES];
        for _ in 0..16 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => self.pipe_open = false,
                Ok(len) => {
                    self.tail.extend_from_slice(buffer.get(..len).unwrap_or_default());
                    let excess = self.tail.len().saturating_sub(OUTPUT_KEPT_BYTES);
                    self.tail.drain(..excess);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {}
            }
            return;
        }
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&self.tail).trim().to_owned()
    }
}

/// A descriptor that becomes readable when the process ends.
fn pidfd(process_id: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers; the process is our child and not waited for, so the id is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process_id, 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn status_text(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
