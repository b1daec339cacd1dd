//! The `blxrep` program: `start` runs a role, the other commands work offline.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
