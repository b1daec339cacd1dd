//! `blxctl`: asks the blxrep daemons of this host over the system bus.
//!
//! In this version the daemons have no bus interface yet, and there is one question: which of them is on the bus.

mod bus;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::status::Role;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage
  3  no blxrep daemon is on the bus";

const STATUS_EXAMPLES: &str = "\
Examples:
  blxctl status
  blxctl status --role agent --json

Exit codes: 0 at least one daemon is on the bus, 3 none, 1 the bus cannot be asked.
DBUS_SYSTEM_BUS_ADDRESS names another bus than the usual one.";

/// Asks the blxrep daemons of this host over the system bus.
#[derive(Parser)]
#[command(name = "blxctl", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Which blxrep daemons are on the system bus, with process and unit
    #[command(after_help = STATUS_EXAMPLES)]
    Status {
        /// Only this role
        #[arg(long, value_enum)]
        role: Option<Role>,
        /// For programs: an array of objects
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let Command::Status { role, json } = Cli::parse().command;
    match status(role, json) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("blxctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn status(role: Option<Role>, json: bool) -> anyhow::Result<ExitCode> {
    let roles = role.map_or(Role::ALL.to_vec(), |role| vec![role]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let daemons = runtime.block_on(bus::ask(&roles))?;
    let text = if json { status::json(&daemons) } else { status::table(&daemons) };
    // Not `print!`, which panics when the reader of a pipe has gone.
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
    Ok(ExitCode::from(status::exit_code(&daemons)))
}
