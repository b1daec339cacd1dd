//! Removes what a test leaves behind, whatever ended it.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, reason = "a test ends so")]

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Removes a directory when this process is gone.
pub struct Janitor(Child);

impl Janitor {
    pub fn new(dir: &Path) -> Self {
        // What uses the directory may be dying still.
        let script = r#"cat
[ -n "$BLXREP_TEST_KEEP" ] || for _ in $(seq 50); do rm -rf --one-file-system "$0" 2>/dev/null && break; sleep 0.1; done"#;
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script, dir.to_str().unwrap()]).stdin(Stdio::piped());
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
