//! Disks for tests: loop devices and zram, gone again when dropped, on a panic too.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Runs a program and gives its output; a test that needs it fails if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("this test needs {program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} failed (is this root?): {stderr}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Waits for something the kernel does a moment later.
pub(crate) fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !ready() {
        assert!(Instant::now() < deadline, "{what} did not come");
        sleep(Duration::from_millis(10));
    }
}

/// A loop device over a sparse file.
pub(crate) struct LoopDisk {
    pub(crate) path: PathBuf,
    pub(crate) file: tempfile::NamedTempFile,
}

impl LoopDisk {
    pub(crate) fn new(size_bytes: u64) -> Self {
        Self::on(&std::env::temp_dir(), size_bytes)
    }

    /// With its file in this directory.
    pub(crate) fn on(dir: &Path, size_bytes: u64) -> Self {
        let file = tempfile::NamedTempFile::new_in(dir).unwrap();
        file.as_file().set_len(size_bytes).unwrap();
        let path = run("losetup", &["--find", "--show", "--partscan", file.path().to_str().unwrap()]);
        Self { path: path.into(), file }
    }

    pub(crate) fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Adds a partition from `start` sectors on, of `sectors`, and gives its path. Told to the kernel without a table on the
    /// disk: a kernel need not know any kind of table.
    pub(crate) fn partition(&self, start: u64, sectors: u64) -> PathBuf {
        run("addpart", &[self.name(), "1", &start.to_string(), &sectors.to_string()]);
        let path = PathBuf::from(format!("{}p1", self.name()));
        wait_for("the partition", || path.exists());
        path
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if Path::new(&format!("{}p1", self.name())).exists() {
            let _ = Command::new("delpart").arg(&self.path).arg("1").status();
        }
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// A zram disk: bio-based.
pub(crate) struct ZramDisk {
    pub(crate) path: PathBuf,
    number: String,
}

impl ZramDisk {
    pub(crate) fn new(size_bytes: u64) -> Self {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")
            .unwrap_or_else(|e| panic!("this test needs zram and root: {e}"));
        let disk =
            Self { path: format!("/dev/zram{}", number.trim()).into(), number: number.trim().to_owned() };
        fs::write(format!("/sys/block/zram{}/disksize", disk.number), size_bytes.to_string()).unwrap();
        wait_for("the zram disk", || disk.path.exists());
        disk
    }
}

impl Drop for ZramDisk {
    fn drop(&mut self) {
        // udev may have the disk open for a moment.
        for _ in 0..100 {
            let reset = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
            if reset.and_then(|()| fs::write("/sys/class/zram-control/hot_remove", &self.number)).is_ok() {
                return;
            }
            sleep(Duration::from_millis(20));
        }
        eprintln!("zram{} could not be removed", self.number);
    }
}

/// A mounted file system.
pub(crate) struct Mounted {
    pub(crate) dir: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(disk: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run("mount", &["-o", options, disk.to_str().unwrap(), dir.path().to_str().unwrap()]);
        Self { dir }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}

/// Memory aligned for O_DIRECT.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start, len }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Opens a disk past the page cache.
pub(crate) fn open_direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Writes `len` bytes of `fill` at `offset`, past the page cache.
pub(crate) fn write_direct(disk: &File, offset: u64, len: usize, fill: u8) {
    let mut buffer = Aligned::new(len);
    buffer.bytes().fill(fill);
    disk.write_all_at(buffer.bytes(), offset).unwrap();
}

/// Reads past the page cache.
pub(crate) fn read_direct(disk: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = Aligned::new(len);
    disk.read_exact_at(buffer.bytes(), offset)?;
    Ok(buffer.bytes().to_vec())
}

/// A small generator of numbers: the same ones for the same seed (xorshift64*, Vigna 2016).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % end
    }
}
