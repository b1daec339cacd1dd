//! Compiles the BPF object with clang.
//!
//! `CLANG` names another clang; `BLXREP_BPF_CFLAGS` adds flags (NixOS: the place of libbpf's headers).

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

const SOURCE: &str = "src/tracker.bpf.c";

fn main() -> ExitCode {
    for name in ["CLANG", "BLXREP_BPF_CFLAGS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCE}");
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', " | "));
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let extra = env::var("BLXREP_BPF_CFLAGS").unwrap_or_default();
    let out_dir = env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?;
    let mut command = Command::new(&clang);
    // The path is relative and the directory hidden, so that the object does not depend on where it was built: a
    // tracker left by an earlier program is taken over only if its object is the same, byte for byte.
    command.args([
        "-target",
        "bpf",
        "-mcpu=v3",
        "-O2",
        "-g",
        "-Wall",
        "-Werror",
        "-fdebug-compilation-dir=.",
    ]);
    command.args(extra.split_whitespace());
    for dir in system_includes(&clang)? {
        command.arg("-idirafter").arg(dir);
    }
    command.args(["-c", SOURCE, "-o"]).arg(Path::new(&out_dir).join("tracker.bpf.o"));
    let output = command.output().map_err(|e| not_found(&clang, &e))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("bpf/") && stderr.contains("file not found") {
        return Err(format!(
            "libbpf's headers are missing: install libbpf-dev (Debian) or libbpf-devel (Fedora), or name their place in BLXREP_BPF_CFLAGS=-I...\n{stderr}"
        ));
    }
    Err(format!("{clang} could not compile {SOURCE}:\n{stderr}"))
}

fn not_found(clang: &str, error: &std::io::Error) -> String {
    format!(
        "{clang} cannot be run ({error}): install clang 12 or newer, or name it in the environment variable CLANG"
    )
}

/// Where this clang looks for the host's headers: the target bpf alone does not find `asm/types.h` where distributions
/// keep it in a directory named after the machine.
fn system_includes(clang: &str) -> Result<Vec<String>, String> {
    let output = Command::new(clang)
        .args(["-E", "-v", "-x", "c", "/dev/null"])
        .output()
        .map_err(|e| not_found(clang, &e))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let dirs = text
        .lines()
        .skip_while(|line| !line.starts_with("#include <...>"))
        .skip(1)
        .take_while(|line| line.starts_with(' '));
    Ok(dirs.map(|line| line.trim().to_owned()).collect())
}
