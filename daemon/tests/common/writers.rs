//! What writes to a disk while it is replicated.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test ends so")]

use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::lab::mortal;

/// Something that writes until it is dropped.
pub struct Writer(pub Child);

impl Writer {
    /// Random writes by fio.
    pub fn fio(dir: &Path, engine: &str, direct: bool) -> Self {
        // Only buffered writes may be smaller than a page everywhere.
        let sizes =
            if engine == "sync" { "--bssplit=512/10:4k/60:64k/25:300k/5" } else { "--bssplit=4k/70:64k/30" };
        let child = mortal("fio")
            .args(["--name=w", "--rw=randwrite", sizes, "--size=12M", "--nrfiles=3"])
            .args([
                "--time_based",
                "--runtime=600",
                "--thread",
                "--rate=1M",
                "--overwrite=0",
                "--fallocate=none",
                "--randrepeat=0",
            ])
            .arg(format!("--directory={}", dir.display()))
            .arg(format!("--filename_format={engine}.$jobnum.$filenum"))
            .arg(format!("--ioengine={engine}"))
            .arg(format!("--direct={}", u8::from(direct)))
            .arg(if direct { "--iodepth=8" } else { "--fsync=64" })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("fio is needed: run tools/install-deps test");
        Self(child)
    }

    /// Files made, changed, punched and removed.
    pub fn files(dir: &Path) -> Self {
        let script = r#"cd "$0" || exit 1; i=0; while :; do i=$((i+1)); n=$((i%20))
head -c $((n*20000+100)) /dev/urandom > f$n; [ $((i%3)) = 0 ] && fallocate -p -o 8192 -l 16384 f$n
mv f$n g$n; [ $((i%7)) = 0 ] && rm -f g$((n/2)); sync f$n 2>/dev/null; sleep 0.05; done"#;
        let child = mortal("sh").args(["-c", script]).arg(dir).stderr(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = Command::new("pkill").args(["-KILL", "-P", &self.0.id().to_string()]).status();
    }
}
