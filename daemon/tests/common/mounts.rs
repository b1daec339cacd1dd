//! Loop disks with real file systems, that go away whatever happens to the test.

// Every test binary that includes this file uses another part of it.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blxrep::freeze::mountinfo::DeviceNumber;
use blxrep::freeze::mounts::{Mount, freeze, thaw};
use std::os::fd::AsFd;

/// Runs a program; the test fails with what it said if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(output.status.success(), "{program} {args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < end, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The number of a block device.
pub(crate) fn number(device: &Path) -> DeviceNumber {
    DeviceNumber::from_dev(fs::metadata(device).unwrap().rdev())
}

/// A loop device over a sparse file, with what is mounted from it.
pub(crate) struct LoopDisk {
    pub(crate) path: PathBuf,
    pub(crate) image: PathBuf,
    /// For mount points and whatever a test needs; not on the disk.
    pub(crate) dir: PathBuf,
    mounts: Vec<PathBuf>,
    swaps: Vec<PathBuf>,
    _dir: Option<tempfile::TempDir>,
}

impl LoopDisk {
    /// A disk of so many MiB; with `partitions`, sizes in MiB, a GPT with them.
    pub(crate) fn new(size_mib: u64, partitions: &[u64]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut disk = Self::at(&dir.path().join("image"), dir.path(), size_mib, partitions, &[]);
        disk._dir = Some(dir);
        disk
    }

    /// The same with the image at a given place, and more options for losetup(8).
    pub(crate) fn at(image: &Path, dir: &Path, size_mib: u64, partitions: &[u64], options: &[&str]) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test needs root: it makes loop devices and mounts them"
        );
        fs::File::create(image).unwrap().set_len(size_mib << 20).unwrap();
        let image = image.to_str().unwrap();
        if !partitions.is_empty() {
            let script: String = partitions.iter().map(|mib| format!("size={mib}MiB\n")).collect();
            run("sh", &["-c", &format!("printf 'label: gpt\n{script}' | sfdisk -q {image}")]);
        }
        let args = [&["--find", "--show", "--partscan"], options, &[image]].concat();
        let path = PathBuf::from(run("losetup", &args));
        if !partitions.is_empty() {
            // Not every kernel reads a GPT by itself.
            run("partx", &["--update", &path.display().to_string()]);
        }
        let (image, dir) = (image.into(), dir.to_owned());
        let disk = Self { path, image, dir, mounts: Vec::new(), swaps: Vec::new(), _dir: None };
        for index in 1..=partitions.len() {
            wait_until("the node of a partition", || disk.part(index).exists());
        }
        disk
    }

    /// The partition's device, from 1 on.
    pub(crate) fn part(&self, index: usize) -> PathBuf {
        PathBuf::from(format!("{}p{index}", self.path.display()))
    }

    /// The disk's number.
    pub(crate) fn number(&self) -> DeviceNumber {
        number(&self.path)
    }

    /// Makes a file system and mounts it.
    pub(crate) fn mkfs(&mut self, fs_type: &str, device: &Path) -> PathBuf {
        let force = if fs_type == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{fs_type}"), &["-q", force, device.to_str().unwrap()]);
        self.mount(&["-t", fs_type, device.to_str().unwrap()])
    }

    /// Mounts, with these arguments of mount(8), on a new directory.
    pub(crate) fn mount(&mut self, args: &[&str]) -> PathBuf {
        let point = self.dir.join(format!("mount {}", self.mounts.len()));
        fs::create_dir(&point).unwrap();
        self.mount_on(args, &point);
        point
    }

    /// Mounts on a given directory.
    pub(crate) fn mount_on(&mut self, args: &[&str], point: &Path) {
        run("mount", &[args, &[point.to_str().unwrap()]].concat());
        self.mounts.push(point.to_owned());
    }

    /// Makes a swap area and uses it.
    pub(crate) fn swap_on(&mut self, device: &Path) {
        let device_text = device.to_str().unwrap();
        run("mkswap", &[device_text]);
        run("swapon", &[device_text]);
        self.swaps.push(device.to_owned());
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let quietly = |program: &str, args: &[&str]| drop(Command::new(program).args(args).output());
        for point in self.mounts.iter().rev().filter_map(|p| p.to_str()) {
            quietly("fsfreeze", &["--unfreeze", point]);
            // A guard or writer of a test that failed may need a moment to let go.
            let unmounted =
                || Command::new("umount").arg(point).output().is_ok_and(|done| done.status.success());
            let _ = (0..50).any(|_| {
                let done = unmounted();
                if !done {
                    std::thread::sleep(Duration::from_millis(100));
                }
                done
            });
        }
        for swap in self.swaps.iter().filter_map(|p| p.to_str()) {
            quietly("swapoff", &[swap]);
        }
        if self.path.metadata().is_ok_and(|m| m.file_type().is_block_device()) {
            quietly("losetup", &["--detach", self.path.to_str().unwrap_or_default()]);
        }
    }
}

/// Whether a file system is frozen; if not, it is so for an instant, as there is no other way to know.
pub(crate) fn is_frozen(mount: &Mount) -> bool {
    let fd = mount.open().unwrap();
    match freeze(fd.as_fd()) {
        Err(nix::errno::Errno::EBUSY) => true,
        Ok(()) => {
            thaw(fd.as_fd()).unwrap();
            false
        }
        Err(e) => panic!("{}: {e}", mount.mount_point.display()),
    }
}
