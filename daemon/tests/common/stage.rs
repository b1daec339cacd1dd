//! blxrep as it is installed on a machine.
#![allow(unreachable_pub, reason = "a module of test binaries")]
#![allow(clippy::unwrap_used, reason = "a test ends so")]

use std::path::Path;
use std::process::Command;

use super::lab::run;

/// What was built is installed below a directory, as a package would.
pub(crate) fn install(stage: &Path) {
    let tree = format!("{}/..", env!("CARGO_MANIFEST_DIR"));
    let mut make = Command::new("make");
    make.args(["-s", "-C", &tree, "install", "PREFIX=/usr", "PROFILE=dev"]);
    make.arg(format!("DESTDIR={}", stage.display())).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    let made = make.output().unwrap();
    assert!(made.status.success(), "make install: {}", String::from_utf8_lossy(&made.stderr));
    for program in ["blxrep", "blxctl"] {
        run("strip", &["--strip-debug", stage.join("usr/bin").join(program).to_str().unwrap()]);
    }
}
