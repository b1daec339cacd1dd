//! What a restore writes to, opened with the rights of whoever calls: the dispatcher's user may write nowhere else.
//!
//! What must never happen here: a regular file overwritten, a device written that something else uses, a temporary
//! file left behind. `blxrep dispatcher restore` keeps the same rules.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat2};

use crate::failure::{Exit, Failure};

/// An open target. A new file goes away when this is dropped before [`Self::finish`].
#[derive(Debug)]
pub(crate) struct Target {
    file: File,
    path: PathBuf,
    /// The name it has until it is whole; `None` for a device.
    temporary: Option<PathBuf>,
}

/// The absolute path of a target, as the daemon is told it.
pub(crate) fn absolute(path: &Path) -> Result<(PathBuf, String), Failure> {
    let path = std::path::absolute(path).map_err(|e| failure(path, "find it", &e))?;
    match path.to_str() {
        Some(text) => Ok((path.clone(), text.to_owned())),
        None => Err(Failure::usage(format!("{}: the name must be UTF-8", path.display()))),
    }
}

/// Whether there is a block device at `path`; refuses whatever else is there.
pub(crate) fn is_device(path: &Path) -> Result<bool, Failure> {
    match path.metadata() {
        Ok(meta) if meta.file_type().is_block_device() => Ok(true),
        Ok(_) => Err(there_already(path)),
        // A link to nowhere is not found, but has the name.
        Err(e) if e.kind() == io::ErrorKind::NotFound => match path.symlink_metadata() {
            Ok(_) => Err(there_already(path)),
            Err(_) => Ok(false),
        },
        Err(e) => Err(failure(path, "look at it", &e)),
    }
}

fn there_already(path: &Path) -> Failure {
    Failure::usage(format!(
        "{} is there already and is not overwritten: name another target or remove it",
        path.display()
    ))
}

fn failure(path: &Path, what: &str, error: &io::Error) -> Failure {
    Failure::failed(format!("{}: cannot {what}: {error}", path.display()))
}

impl Target {
    /// Opens a device for itself, or makes a hidden new file beside the one that is to be.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        if is_device(path)? {
            let open =
                OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_EXCL.bits()).open(path);
            let file = open.map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EBUSY) => Failure::new(
                    Exit::Usage,
                    format!(
                        "{} is in use (mounted, or part of LVM, md or the like): free it first",
                        path.display()
                    ),
                ),
                _ => failure(path, "open it", &e),
            })?;
            // Asked of what is open: the name may mean something else by now.
            let kind = file.metadata().map_err(|e| failure(path, "look at it", &e))?.file_type();
            if !kind.is_block_device() {
                return Err(Failure::usage(format!("{} is no block device any more", path.display())));
            }
            return Ok(Self { file, path: path.to_owned(), temporary: None });
        }
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.ok_or_else(|| Failure::usage(format!("{} names no file", path.display())))?;
        let temporary = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let open = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let file = open.map_err(|e| failure(path, "create it", &e))?;
        Ok(Self { file, path: path.to_owned(), temporary: Some(temporary) })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The name it has while it is written.
    pub(crate) fn written(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.path)
    }

    /// Gives a new file its name, durably, if nothing has that name meanwhile.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.file.sync_all().map_err(|e| failure(&self.path, "sync it", &e))?;
        let Some(temporary) = &self.temporary else { return Ok(()) };
        rename_new(temporary, &self.path).map_err(|e| failure(&self.path, "give it its name", &e))?;
        self.temporary = None;
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(parent).and_then(|dir| dir.sync_all());
        synced.map_err(|e| failure(&self.path, "sync its directory", &e))
    }
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // A file system without that flag (NFS, some FUSE): a link refuses to replace as well.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_file_appears_whole_and_only_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let target = Target::open(&path).unwrap();
        assert_eq!(names(dir.path()), [format!(".a.img.{}.part", std::process::id())]);
        target.file.write_all_at(b"disk", 0).unwrap();
        target.finish().unwrap();
        assert_eq!(names(dir.path()), ["a.img"]);
        assert_eq!(fs::read(&path).unwrap(), b"disk");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_target_that_is_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Target::open(&dir.path().join("a.img")).unwrap());
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn nothing_that_is_there_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        symlink(dir.path().join("nowhere"), &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned(), &dir.path().join("..")] {
            let failure = Target::open(path).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{failure}");
        }
        assert_eq!(names(dir.path()), ["a.img", "link"]);
    }

    #[test]
    fn a_file_that_took_the_name_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let target = Target::open(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        let failure = target.finish().unwrap_err();
        assert_eq!(failure.exit, Exit::Failed);
        assert_eq!((names(dir.path()).len(), fs::read(&path).unwrap()), (1, b"precious".to_vec()));
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_that_names_the_target() {
        let failure = Target::open(Path::new("/nonexistent/a.img")).unwrap_err();
        insta::assert_snapshot!(failure, @"/nonexistent/a.img: cannot create it: No such file or directory (os error 2)");
    }
}
