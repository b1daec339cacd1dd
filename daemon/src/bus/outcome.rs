//! What jobs give back, as the bus carries it.

use std::collections::HashMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use blxrep_dbus::problem::{Problem, ProblemKind};
use zbus::wire::{OwnedVariant, Variant};

use super::control::{Details, Failure, Progress};
use crate::ids::{AgentId, DiskId};
use crate::restore::{DiskReport, DiskSummary, RestoreError, RestoreReport};
use crate::status::{DiskState, DiskStatus};
use crate::store::Damage;

/// The most checkpoints in one answer: a bus takes no message without end (32 MiB by dbus-daemon's default).
pub(crate) const SHOW_ROWS_MAX: usize = 20_000;
/// The most lines of damage in one answer: a bus takes no message without end.
const DAMAGE_MAX: usize = 1000;

/// That an answer would be of more than [`SHOW_ROWS_MAX`] checkpoints.
pub(crate) fn too_many_rows(count: usize) -> Problem {
    let text = format!("{count} checkpoints are too many for one answer: give start, end or disk");
    Problem::new(ProblemKind::InvalidArgument, text)
}

/// One value of [`Details`].
pub(crate) fn value<'a>(value: impl Into<Variant<'a>>) -> OwnedVariant {
    // Only file descriptors cannot be copied, and no result holds one.
    value.into().try_to_owned().unwrap_or_else(|_| OwnedVariant::from(0u8))
}

/// How a job's [`Progress`] is told by what works, and told whether to go on.
pub(crate) fn report(progress: &Progress) -> impl Fn(u64, u64) -> ControlFlow<()> + '_ {
    |done_bytes, total_bytes| {
        progress.report(done_bytes, total_bytes);
        if progress.is_canceled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// How far the ordered compares of disks are; what was told once is not taken back.
pub(crate) struct Compared(Vec<Comparing>);

struct Comparing {
    disk: (AgentId, DiskId),
    size_bytes: u64,
    done_bytes: u64,
}

impl Compared {
    /// None of them has begun.
    pub(crate) fn new(disks: &[DiskStatus]) -> Self {
        let comparing = |disk: &DiskStatus| Comparing {
            disk: (disk.agent.clone(), disk.disk.clone()),
            size_bytes: disk.size_bytes,
            done_bytes: 0,
        };
        Self(disks.iter().map(comparing).collect())
    }

    /// Tells a job how far they are.
    pub(crate) fn tell(&mut self, now: impl FnOnce() -> Vec<DiskStatus>, progress: &Progress) {
        if self.0.is_empty() {
            return;
        }
        for status in now().iter().filter(|status| status.state == DiskState::Comparing) {
            let is_it = |of: &&mut Comparing| (&of.disk.0, &of.disk.1) == (&status.agent, &status.disk);
            if let Some(of) = self.0.iter_mut().find(is_it) {
                of.done_bytes = of.done_bytes.max((of.size_bytes as f64 * status.progress) as u64);
            }
        }
        let sum = |bytes: fn(&Comparing) -> u64| self.0.iter().map(bytes).fold(0, u64::saturating_add);
        progress.report(sum(|of| of.done_bytes), sum(|of| of.size_bytes));
    }
}

/// That a job was told to end.
pub(crate) fn canceled() -> Problem {
    Problem::new(ProblemKind::Canceled, "canceled")
}

/// The details of a restore.
pub(crate) fn restored(report: &RestoreReport) -> Details {
    let checkpoint = &report.checkpoint;
    Details::from([
        ("checkpoint".to_owned(), value(checkpoint.id.to_string())),
        ("disk".to_owned(), value(checkpoint.disk.as_str())),
        ("consistency".to_owned(), value(checkpoint.consistency.to_string())),
        ("note".to_owned(), value(checkpoint.note.as_str())),
        ("output".to_owned(), value(report.output.display().to_string())),
        ("size_bytes".to_owned(), value(checkpoint.geometry.size_bytes())),
        ("written_bytes".to_owned(), value(report.written_bytes)),
        ("unreadable_blocks".to_owned(), value(checkpoint.unreadable_blocks)),
        ("unreadable_sectors".to_owned(), value(report.unreadable_sectors.as_str())),
    ])
}

/// The details of a verify.
pub(crate) fn verified(reports: &[DiskReport]) -> Details {
    let mut damage: Vec<String> =
        reports.iter().flat_map(DiskReport::damage).map(Damage::to_string).collect();
    let more = damage.len().saturating_sub(DAMAGE_MAX);
    if more > 0 {
        damage.truncate(DAMAGE_MAX);
        damage.push(format!("and {more} more"));
    }
    let rows: Vec<_> = reports.iter().map(|report| summary_details(report.summary())).collect();
    let mut details =
        Details::from([("damage".to_owned(), value(damage)), ("verified".to_owned(), value(rows))]);
    if let [DiskReport { owner, verified, .. }] = reports
        && let [one] = &**verified
    {
        details.extend([
            ("checkpoint".to_owned(), value(one.id.to_string())),
            ("disk".to_owned(), value(owner.disk.as_str())),
            ("unreadable_blocks".to_owned(), value(one.unreadable_blocks)),
            ("unreadable_sectors".to_owned(), value(one.unreadable_sectors.as_str())),
        ]);
    }
    details
}

fn summary_details(summary: DiskSummary) -> HashMap<&'static str, Variant<'static>> {
    HashMap::from([
        ("agent", summary.agent.into()),
        ("disk", summary.disk.into()),
        ("oldest", summary.oldest.into()),
        ("newest", summary.newest.into()),
        ("checkpoints", summary.checkpoints.into()),
        ("damaged", summary.damaged.into()),
        ("first_damaged", summary.first_damaged.unwrap_or_default().into()),
        ("unreadable", summary.unreadable.into()),
    ])
}

/// Damage, one line each.
pub(crate) fn lines(damage: &[Damage]) -> Vec<String> {
    damage.iter().map(Damage::to_string).collect()
}

impl From<RestoreError> for Problem {
    fn from(error: RestoreError) -> Self {
        let message = match &error {
            RestoreError::Damaged(_) => {
                "what this checkpoint rests on is damaged: try an older one".to_owned()
            }
            error => error.to_string(),
        };
        Self::new(error.kind(), message)
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        let damage = if let RestoreError::Damaged(damage) = &error { lines(damage) } else { Vec::new() };
        Self { problem: error.into(), damage }
    }
}

/// Refuses a target that this process cannot or must not make, before a job begins for it. `own`: the daemon's own
/// directory, where only a new `.img` directly in it is let be: everything else there may be taken for something of its own.
///
/// # Errors
/// InvalidArgument.
pub(crate) fn check_target(target: &Path, own: &Path) -> Result<(), Problem> {
    use nix::unistd::{AccessFlags, access};
    use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
    let refuse = |what: &str| {
        Err(Problem::new(ProblemKind::InvalidArgument, format!("target {}: {what}", target.display())))
    };
    if !target.is_absolute() {
        return refuse("an absolute path is expected");
    }
    let with_your_rights = "'blxctl restore' opens it with your rights";
    match target.metadata() {
        Ok(meta) if meta.file_type().is_block_device() => {
            let opened = File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(target);
            opened
                .map(drop)
                .or_else(|e| refuse(&format!("this service cannot open it: {e}; {with_your_rights}")))
        }
        Ok(_) => refuse("it is there already and is not overwritten: name another one or remove it"),
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => refuse(&e.to_string()),
        Err(_) => {
            let named = target.parent().unwrap_or(Path::new("/"));
            let (parent, real_own) = match (named.canonicalize(), own.canonicalize()) {
                (Ok(parent), Ok(own)) => (parent, own),
                (Err(e), _) | (_, Err(e)) => return refuse(&format!("its directory: {e}")),
            };
            let is_image = target.extension().is_some_and(|extension| extension == "img");
            // Not by a link of somebody's, which may lead deeper when it is followed again.
            let is_named = named == own || named == real_own;
            if parent.starts_with(&real_own) && !(is_named && is_image) {
                return refuse(&format!(
                    "of {} only a file *.img directly in it may be restored to",
                    own.display()
                ));
            }
            access(&parent, AccessFlags::W_OK).or_else(|e| {
                let place = format!("or name {}/NAME.img", own.display());
                refuse(&format!(
                    "this service cannot write there ({}): {with_your_rights}, {place}",
                    e.desc()
                ))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends so")]

    use super::*;

    #[test]
    fn a_compare_never_goes_back_and_counts_only_its_own_disks() {
        let disk = |id: &str| DiskStatus::new("web1".parse().unwrap(), id.parse().unwrap(), id.into(), 1000);
        let mut now = vec![disk("sda"), disk("sdb"), disk("sdc")];
        let (mut compared, progress) = (Compared::new(&now[..2]), Progress::default());
        for (sda, sdb, told) in [(0.5, 0.0, 500), (0.4, 0.1, 600), (0.0, 0.9, 1400)] {
            for (disk, share) in now.iter_mut().zip([sda, sdb, 0.3]) {
                (disk.state, disk.progress) = (DiskState::Comparing, share);
            }
            compared.tell(|| now.clone(), &progress);
            assert_eq!(progress.bytes(), (told, 2000));
        }
        let none = Progress::default();
        Compared::new(&[]).tell(|| unreachable!(), &none);
        assert_eq!(none.bytes(), (0, 0));
    }

    #[test]
    fn a_target_is_new_and_not_a_part_of_the_store() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(own.path().join("snapshot/web1")).unwrap();
        std::fs::write(other.path().join("there"), "x").unwrap();
        std::os::unix::fs::symlink(own.path().join("snapshot"), other.path().join("link")).unwrap();
        std::os::unix::fs::symlink(own.path(), other.path().join("own")).unwrap();
        let check = |path: std::path::PathBuf| check_target(&path, own.path());
        check(other.path().join("new")).unwrap();
        check(own.path().join("web1.img")).unwrap();
        for (path, says) in [
            (other.path().join("there"), "not overwritten"),
            (own.path().join("paused"), "*.img"),
            (own.path().join("snapshot/web1/x.img"), "*.img"),
            (other.path().join("link/web1/x.img"), "*.img"),
            (other.path().join("own/x.img"), "*.img"),
            (other.path().join("none/x.img"), "its directory"),
            ("x.img".into(), "absolute"),
        ] {
            let problem = check(path.clone()).unwrap_err();
            assert_eq!(problem.kind, ProblemKind::InvalidArgument);
            assert!(problem.message.contains(says), "{path:?}: {problem}");
        }
    }
}
