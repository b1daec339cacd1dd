//! `blxctl`: asks and orders the blxrep daemons of this host over the system bus.

mod agent_tty;
mod boot;
mod cli;
mod commands;
mod connect;
mod ended;
mod exports;
mod failure;
#[path = "../../daemon/src/cli/generate.rs"]
mod generate;
mod help;
mod job;
mod model;
mod output;
mod qcow2;
mod render;
mod serve;
mod status;
mod target;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::agent_tty::AgentTty;
use self::cli::{Cli, Command};
use self::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            for (i, line) in failure.message.lines().enumerate() {
                eprintln!("{}{line}", if i == 0 { "blxctl: " } else { "  " });
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    if let Command::Generate { dir } = &cli.command {
        let generated = generate::generate(Cli::command(), dir);
        generated.map_err(|e| Failure::failed(format!("{}: {e}", dir.display())))?;
        return Ok(ExitCode::SUCCESS);
    }
    let _agent = AgentTty::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::failed(format!("cannot begin: {e}")))?;
    runtime.block_on(commands::run(cli))
}
