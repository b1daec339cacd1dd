//! Reads and checks everything that is stored, slowly, again and again: damage is found before it is needed.
//!
//! One blocking thread. It gives way to everything else: it is in the idle class of the disk's queue, spreads a pass over the
//! time that a pass may take, and is not watched by systemd's watchdog, because it may be held up for long and nothing waits
//! for it. What must never happen here: a file changed; a file called damaged that is only not there any more.

mod pass;
pub(crate) mod record;
mod schedule;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

pub use self::record::LastPass;
use self::record::Record;
pub use self::schedule::{Course, Pace};
use crate::clock::unix_ms;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::message_id::DAMAGE_FOUND;
use crate::restore::{DiskReport, RestoreError};
use crate::store::Damage;
use crate::store::files::Files;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::wire::key::write_private;

/// The record's name in the data directory.
pub const FILE: &str = "scrub";
const FILE_MAX_BYTES: u64 = 64 << 20;
/// The place of a pass is kept this often; what was checked behind it is checked again after a restart.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// Between two attempts where the data directory cannot be read, or holds nothing yet.
const RETRY_EVERY: Duration = Duration::from_secs(60);
/// The longest wait without a look at the clock, which may be put right.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// What a stop waits for; a thread that a disk holds up ends with the process, and leaves nothing behind.
const STOP_MAX: Duration = Duration::from_secs(1);

/// How the scrub is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubStatus {
    /// The time of a pass; `None` if it is switched off.
    pub every: Option<Duration>,
    /// How far the pass under way is; `None` between two.
    pub course: Option<Course>,
    /// The last pass that came to its end.
    pub last: Option<LastPass>,
    /// How many checkpoints have files that are damaged.
    pub damaged: usize,
}

/// What checks, and what is known of damage. Shared with those who ask.
pub struct Scrub {
    dir: Dir,
    file: PathBuf,
    pace: Option<Pace>,
    record: Mutex<Record>,
    /// Bytes that were checked behind the place that the record has.
    ahead_bytes: AtomicU64,
    saved: Mutex<Instant>,
    save_fails: AtomicBool,
    stopping: Mutex<bool>,
    woken: Condvar,
}

/// The thread that checks.
pub struct Running {
    scrub: Arc<Scrub>,
    ended: mpsc::Receiver<()>,
}

impl Running {
    /// Ends it. Blocks, but not for long.
    pub fn stop(self) {
        *lock(&self.scrub.stopping) = true;
        self.scrub.woken.notify_all();
        let _ = self.ended.recv_timeout(STOP_MAX);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scrub {
    /// Of the data directory `files`; what is known is kept in `file`. Without a pace nothing is checked. A record that cannot
    /// be read is made anew: a pass then begins at once.
    pub fn open(files: Arc<dyn Files>, file: PathBuf, pace: Option<Pace>) -> Self {
        let record = load(&file).unwrap_or_else(|error| {
            warn!("{}: {error}; the scrub begins anew", file.display());
            Record::default()
        });
        Self {
            dir: Dir::new(files),
            file,
            pace,
            record: Mutex::new(record),
            ahead_bytes: AtomicU64::new(0),
            saved: Mutex::new(Instant::now()),
            save_fails: AtomicBool::new(false),
            stopping: Mutex::new(false),
            woken: Condvar::new(),
        }
    }

    /// Begins to check, if there is a pace.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(self: &Arc<Self>) -> io::Result<Option<Running>> {
        let Some(pace) = self.pace else { return Ok(None) };
        let (scrub, (end, ended)) = (self.clone(), mpsc::channel());
        std::thread::Builder::new().name("scrub".into()).spawn(move || {
            give_way();
            scrub.run(pace);
            let _ = end.send(());
        })?;
        Ok(Some(Running { scrub: self.clone(), ended }))
    }

    /// How it is doing.
    pub fn status(&self) -> ScrubStatus {
        let record = lock(&self.record);
        let ahead = self.ahead_bytes.load(Ordering::Relaxed);
        let course = record.pass.as_ref().map(|pass| ahead_of(&pass.course, ahead));
        ScrubStatus {
            every: self.pace.map(|pace| pace.every),
            course,
            last: record.last,
            damaged: record.damage().count(),
        }
    }

    /// All that is known to be damaged: disk and lines.
    pub fn damage(&self) -> Vec<(AgentId, DiskId, Vec<String>)> {
        let owned = |(agent, disk, lines): (&AgentId, &DiskId, &[String])| {
            (agent.clone(), disk.clone(), lines.to_vec())
        };
        lock(&self.record).damage().map(owned).collect()
    }

    /// Takes in what a verify found, damaged or sound, and tells of the damage. Blocks.
    pub fn verified(&self, reports: &[DiskReport]) {
        for DiskReport { owner, looked, .. } in reports {
            for (id, damage) in looked {
                let (_, healed) = lock(&self.record).look(owner, *id, lines(damage));
                tell(owner, *id, &lines(damage), healed);
            }
        }
        self.save();
    }

    fn run(&self, pace: Pace) {
        let mut is_said = false;
        loop {
            let next = self.pass(pace).and_then(|()| {
                is_said = false;
                self.wait_for_next(pace)
            });
            let Err(error) = next else { continue };
            if is_canceled(&error) {
                break;
            }
            if !std::mem::replace(&mut is_said, true) {
                warn!("the scrub waits: {error}");
            }
            if self.wait(RETRY_EVERY).is_err() {
                break;
            }
        }
        self.save();
    }

    /// Waits as long as it has to behind bytes that were read.
    fn tick(&self, pace: Pace, bytes: u64) -> Result<(), RestoreError> {
        let ahead = self.ahead_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.wait(pace.rest(bytes))?;
        loop {
            let early = lock(&self.record).pass.as_mut().map_or(Duration::ZERO, |pass| {
                pass.course.settle(pace, unix_ms());
                pace.early(&ahead_of(&pass.course, ahead), unix_ms())
            });
            if early.is_zero() {
                return Ok(());
            }
            self.wait(early.min(WAIT_MAX))?;
        }
    }

    fn wait_for_next(&self, pace: Pace) -> Result<(), RestoreError> {
        loop {
            let last = lock(&self.record).last;
            let early =
                last.map_or(Duration::ZERO, |last| pace.early_for_next(last.began_unix_ms, unix_ms()));
            if early.is_zero() {
                return Ok(());
            }
            self.wait(early.min(WAIT_MAX))?;
        }
    }

    /// Waits; its error is that it is to end.
    fn wait(&self, longest: Duration) -> Result<(), RestoreError> {
        let stopping = lock(&self.stopping);
        let waited = self.woken.wait_timeout_while(stopping, longest, |stopping| !*stopping);
        let (stopping, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *stopping { Err(RestoreError::Canceled { hint: "" }) } else { Ok(()) }
    }

    /// Takes what was checked into the record: to here it need not be checked again.
    fn came_to(&self, group: Option<u64>) {
        let mut record = lock(&self.record);
        let ahead = self.ahead_bytes.swap(0, Ordering::Relaxed);
        let Some(pass) = &mut record.pass else { return };
        pass.course = ahead_of(&pass.course, ahead);
        if let (Some(at), Some(group)) = (&mut pass.at, group) {
            at.groups = group;
        }
    }

    fn save_if_due(&self) {
        if lock(&self.saved).elapsed() >= SAVE_EVERY {
            self.save();
        }
    }

    fn save(&self) {
        // Held while the file is written: those who only ask do not wait for a disk.
        let mut saved = lock(&self.saved);
        let text = serde_json::to_string(&*lock(&self.record)).map_err(io::Error::from);
        let written = text.and_then(|text| write_private(&self.file, text.as_bytes()));
        let failed_before = self.save_fails.swap(written.is_err(), Ordering::Relaxed);
        if let (Err(error), false) = (written, failed_before) {
            warn!("{}: {error}; after a restart the scrub goes on from an older place", self.file.display());
        }
        *saved = Instant::now();
    }
}

fn load(file: &std::path::Path) -> io::Result<Record> {
    let meta = match std::fs::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Record::default()),
        other => other?,
    };
    if meta.len() > FILE_MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(serde_json::from_str(&std::fs::read_to_string(file)?)?)
}

fn ahead_of(course: &Course, bytes: u64) -> Course {
    Course { done_bytes: course.done_bytes.saturating_add(bytes), ..*course }
}

fn lines(damage: &[Damage]) -> Vec<String> {
    damage.iter().map(Damage::to_string).collect()
}

fn is_canceled(error: &RestoreError) -> bool {
    matches!(error, RestoreError::Canceled { .. })
}

/// Tells the journal what is damaged now, or is not any more.
fn tell(owner: &Paths, id: CheckpointId, damage: &[String], healed: bool) {
    let Paths { agent, disk } = owner;
    for line in damage {
        error!(MESSAGE_ID = DAMAGE_FOUND, AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "{line}");
    }
    if healed {
        info!(AGENT = %agent, DISK = %disk, CHECKPOINT = %id, "the files of {agent}'s {disk} of checkpoint {id} are sound again");
    }
}

/// Puts this thread behind all others at the disk's queue, where the scheduler of the disk knows classes.
fn give_way() {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_IDLE: libc::c_int = 3 << 13;
    // SAFETY: ioprio_set(2) takes three numbers; 0 is the calling thread.
    let set = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, CLASS_IDLE) };
    if set != 0 {
        debug!("the scrub is not in the idle class: {}", io::Error::last_os_error());
    }
}
