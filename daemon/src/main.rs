//! The program `blxrep`.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|arg| arg == blxrep::freeze::guard::SUBCOMMAND) {
        return blxrep::freeze::guard::main();
    }
    ExitCode::SUCCESS
}
