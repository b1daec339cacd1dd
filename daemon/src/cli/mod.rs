//! The command line: what a person may type, and what the exit code says.

mod enroll;
mod fetch;
mod generate;
mod log;
mod offline;
mod serve;
mod service;
mod signals;
mod start_agent;
mod start_dispatcher;
mod untrack;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use blxrep::agent::fetch::FetchError;
use blxrep::agent::run::AgentError;
use blxrep::config::value::DispatcherAddr;
use blxrep::config::{AgentConfig, ConfigError, DispatcherConfig, Mode, Settings};
use blxrep::disk_list::DiskListError;
use blxrep::freeze;
use blxrep::ids::{AgentId, IdError};
use blxrep::restore::RestoreError;
use blxrep::wire::key::KeyError;
use blxrep_dbus::problem::ProblemKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  done, and every byte is right
  1  failed
  2  wrong usage or configuration
  3  refused by the dispatcher
  4  damage was found in the store
  5  not found: no such agent, disk or checkpoint";

const START_EXAMPLES: &str = "\
Examples:
  blxrep start                                      what /etc/blxrep/config.yaml says
  blxrep start --mode dispatcher --data-dir /srv/blxrep --agents-file /etc/blxrep/agents --sync-freq 5m
  blxrep start --mode agent --id web1 --dispatcher-addr backup:8080 --device /dev/sda --key-file /etc/blxrep/key";

const CHECK_EXAMPLES: &str = "\
Examples:
  blxrep check-config --mode agent                  what /etc/blxrep/config.yaml says to an agent
  blxrep check-config --mode dispatcher --config new.yaml";

const SHOW_EXAMPLES: &str = "\
Examples:
  blxrep dispatcher show --agent web1 --data-dir /srv/blxrep
  blxrep dispatcher show --agent web1 --data-dir /srv/blxrep --start 202611210000 --json";

const RESTORE_EXAMPLES: &str = "\
Examples:
  blxrep dispatcher restore --agent web1 --data-dir /srv/blxrep --checkpoint latest
  blxrep dispatcher restore --agent web1 --data-dir /srv/blxrep --checkpoint 202611212034 --disk sda --output web1.img
  blxrep dispatcher restore --agent web1 --data-dir /srv/blxrep --checkpoint latest --output /dev/sdb \
--overwrite /dev/sdb
  blxrep dispatcher restore --agent web1 --data-dir /srv/blxrep --checkpoint latest --partition 2 --output root.img";

const FETCH_HELP: &str = "\
A device must not be in use. If it holds a file system, a partition table, LVM, md or encryption, it must be named twice: \
see --overwrite. Only what it does not hold already is sent: a restore that was interrupted goes on when it is begun again. \
All is read back before it counts as done.

Examples:
  blxrep agent restore --dispatcher-addr backup:8080 --key-file web1.key --checkpoint latest --output /dev/sda
  blxrep agent restore --dispatcher-addr backup:8080 --key-file web1.key --disk sdb --checkpoint 202611212034 \
--partition 2 --output /dev/nvme0n1p2 --overwrite /dev/nvme0n1p2";

const VERIFY_EXAMPLES: &str = "\
Examples:
  blxrep dispatcher verify --agent web1 --data-dir /srv/blxrep --checkpoint latest
  blxrep dispatcher verify --agent web1 --data-dir /srv/blxrep --checkpoint 202611212034 --disk sda --json
  blxrep dispatcher verify --agent web1 --data-dir /srv/blxrep --start 202611210000
  blxrep dispatcher verify --all --data-dir /srv/blxrep

JSON:
  damage       an array of objects: file, what, blocks (pairs: the first one, how many)
  verified     an array, one a disk: agent, disk, oldest, newest, checkpoints (how many),
               damaged (how many), first_damaged (all behind it rest on it; null if none is),
               unreadable (how many have zeros for blocks that could not be read)
  of only one  agent, disk, checkpoint, unreadable_blocks, unreadable_sectors as well";

const MOUNT_EXAMPLES: &str = "\
DIR has disk.img, and partN.img for each partition. All of it is read-only, and every block is verified when it is read; one that \
is damaged is an input/output error, and the log names the file. A checkpoint of class filesystem or application has \
clean journals. Of another one:
  mount -o loop,ro,noload DIR/part1.img /mnt         ext4, without its journal
  mount -o loop,ro,norecovery DIR/part1.img /mnt     xfs, without its log
or export it with --writable and let the journal be replayed there.

Examples:
  blxrep dispatcher mount --agent web1 --data-dir /srv/blxrep --checkpoint latest /mnt/web1
  mount -o loop,ro /mnt/web1/part1.img /mnt/files";

const EXPORT_EXAMPLES: &str = "\
Speaks NBD, to 16 clients at most. A unix socket is only for you and root. What connects to a TCP address can read the whole \
disk, and nothing is encrypted: name an address that only the right ones reach.

Examples:
  blxrep dispatcher export --agent web1 --data-dir /srv/blxrep --checkpoint latest --socket /run/web1.sock
  nbdcopy 'nbd+unix:///?socket=/run/web1.sock' web1.img
  qemu-img convert -O qcow2 'nbd+unix:///?socket=/run/web1.sock' web1.qcow2
  blxrep dispatcher export --agent web1 --data-dir /srv/blxrep --checkpoint latest --writable --tcp 127.0.0.1:10809";

const ENROLL_EXAMPLES: &str = "\
Examples:
  blxrep enroll web1 > web1.key                     with what /etc/blxrep/config.yaml says
  blxrep enroll web1 --data-dir /srv/blxrep --agents-file /etc/blxrep/agents > web1.key
then put web1.key on the agent as its key-file, mode 600.";

/// Live replication of disks, for disaster recovery.
#[derive(Parser)]
#[command(name = "blxrep", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a role, agent or dispatcher, in the foreground
    #[command(after_help = START_EXAMPLES)]
    Start(Start),
    /// Check flags and file as 'start' reads them; files and disks they name need not be there
    #[command(after_help = CHECK_EXAMPLES)]
    CheckConfig(Start),
    /// Work on a dispatcher's data directory, with or without a running daemon
    #[command(subcommand)]
    Dispatcher(Offline),
    /// Work on this machine as an agent, without a running daemon
    #[command(subcommand)]
    Agent(Rescue),
    /// Let an agent connect: print its key, keep only a hash
    #[command(after_help = ENROLL_EXAMPLES)]
    Enroll(Enroll),
    /// Stop tracking this machine's disks; the next start of the agent compares them whole
    Untrack(Untrack),
    /// Thaw file systems that an agent which was killed left frozen
    Thaw(Thaw),
    /// The process that freezes and thaws; started by the agent
    #[command(hide = true)]
    FreezeGuard,
    /// Write man pages and completions
    #[command(hide = true)]
    Generate {
        /// Where to
        dir: PathBuf,
    },
}

/// Reads flags and file again.
type Reread = Result<(Settings, PathBuf), ConfigError>;

#[derive(Args)]
struct Start {
    /// The configuration file [default: /etc/blxrep/config.yaml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Subcommand)]
enum Offline {
    /// List the checkpoints of an agent
    #[command(after_help = SHOW_EXAMPLES)]
    Show(Show),
    /// Bring a checkpoint back into a file or onto a block device, every block verified
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(Restore),
    /// Read all that one, some or all checkpoints rest on and list what is damaged
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify(Verify),
    /// Show a checkpoint's disk and partitions as files, until Ctrl-C or umount
    #[command(after_help = MOUNT_EXAMPLES)]
    Mount(Mount),
    /// Show a checkpoint's disk as a network block device, until Ctrl-C
    #[command(after_help = EXPORT_EXAMPLES)]
    Export(Export),
}

#[derive(Subcommand)]
enum Rescue {
    /// Bring a checkpoint back from the dispatcher onto a disk, a partition or into a file: needs only a key
    #[command(after_help = FETCH_HELP)]
    Restore(FetchArgs),
}

#[derive(Args)]
struct FetchArgs {
    /// Host and port of the dispatcher
    #[arg(long, value_name = "HOST:PORT")]
    dispatcher_addr: DispatcherAddr,
    /// The key that 'blxrep enroll' printed
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    /// Whose checkpoint [default: of the agent whose key it is]; another one's where the dispatcher lets it
    #[arg(long)]
    agent: Option<AgentId>,
    /// Which disk, its id or its device's name; needed if the agent has several
    #[arg(long)]
    disk: Option<String>,
    /// Which: YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    #[arg(long)]
    checkpoint: String,
    /// Only this partition of the disk, by its number
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,
    /// A block device that is not in use, or a new file
    #[arg(long, value_name = "TARGET")]
    output: PathBuf,
    /// The target once more, if what it holds is to be overwritten
    #[arg(long, value_name = "TARGET")]
    overwrite: Option<PathBuf>,
}

#[derive(Args)]
struct Show {
    /// Whose checkpoints
    #[arg(long)]
    agent: AgentId,
    /// The dispatcher's data directory
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Only this disk: its id or its device's name
    #[arg(long)]
    disk: Option<String>,
    /// Not before this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE")]
    start: Option<String>,
    /// Not after this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE")]
    end: Option<String>,
    /// For programs: an array of objects
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Restore {
    /// Which: YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    #[arg(long)]
    checkpoint: String,
    /// Whose
    #[arg(long)]
    agent: AgentId,
    /// The dispatcher's data directory
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Which disk, its id or its device's name; needed if the agent has several
    #[arg(long)]
    disk: Option<String>,
    /// Only this partition of the disk, by its number
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,
    /// A new file, or a block device that is not in use [default: AGENT-DISK-CHECKPOINT.img here]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The output once more, if what a device holds is to be overwritten
    #[arg(long, value_name = "FILE", requires = "output")]
    overwrite: Option<PathBuf>,
}

#[derive(Args)]
struct Verify {
    /// Which: YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'; may be given several times
    #[arg(
        long,
        requires = "agent",
        required_unless_present_any = ["start", "end", "all"],
        conflicts_with_all = ["start", "end", "all"]
    )]
    checkpoint: Vec<String>,
    /// All not before this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE", conflicts_with = "all")]
    start: Option<String>,
    /// All not after this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE", conflicts_with = "all")]
    end: Option<String>,
    /// All there are
    #[arg(long)]
    all: bool,
    /// Whose; everybody's without it
    #[arg(long)]
    agent: Option<AgentId>,
    /// The dispatcher's data directory
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Which disk, its id or its device's name; needed with --checkpoint if the agent has several
    #[arg(long, requires = "agent")]
    disk: Option<String>,
    /// For programs: an object
    #[arg(long)]
    json: bool,
}

/// A checkpoint of a data directory.
#[derive(Args)]
struct Checkpoint {
    /// Which: YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    #[arg(long)]
    checkpoint: String,
    /// Whose
    #[arg(long)]
    agent: AgentId,
    /// The dispatcher's data directory
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Which disk, its id or its device's name; needed if the agent has several
    #[arg(long)]
    disk: Option<String>,
}

#[derive(Args)]
struct Mount {
    #[command(flatten)]
    checkpoint: Checkpoint,
    /// An empty directory
    dir: PathBuf,
}

#[derive(Args)]
struct Export {
    #[command(flatten)]
    checkpoint: Checkpoint,
    #[command(flatten)]
    address: Address,
    /// Let clients write, into a file in /var/tmp that is thrown away
    #[arg(long)]
    writable: bool,
}

/// Where to listen.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Address {
    /// Listen on a new unix socket of this name
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on TCP, on this address and port only
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
}

#[derive(Args)]
struct Enroll {
    /// The agent's id
    agent: AgentId,
    /// The dispatcher's data directory [default: the one of /etc/blxrep/config.yaml]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The dispatcher's agents file; the agent is added to it [default: likewise]
    #[arg(long, value_name = "FILE")]
    agents_file: Option<PathBuf>,
    /// The agent may add checkpoints, and not fetch them back
    #[arg(long, conflicts_with = "may_restore")]
    no_restore: bool,
    /// The agent may also fetch the checkpoints of this other agent: new hardware for it, say
    #[arg(long, value_name = "AGENT")]
    may_restore: Vec<AgentId>,
}

#[derive(Args)]
struct Untrack {
    /// The agent whose trackers are removed
    #[arg(long)]
    id: AgentId,
    /// Only this disk, its id or its device's name
    #[arg(long)]
    disk: Option<String>,
}

#[derive(Args)]
struct Thaw {
    /// The agent's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/blxrep")]
    state_dir: PathBuf,
}

/// What a reload says of keys it cannot take.
fn needs_restart(restart: bool) -> &'static str {
    if restart { "; other keys have changed and need a restart" } else { "" }
}

/// Parses, runs, prints the error and makes the exit code.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::FreezeGuard) {
        return freeze::guard::main();
    }
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blxrep: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Start(start) => {
            let reread = move || Settings::load(start.settings.clone(), start.config.as_deref());
            let (settings, file) = reread()?;
            log::init();
            match settings.mode {
                Some(Mode::Agent) => start_agent::run(settings, &file, reread),
                Some(Mode::Dispatcher) => start_dispatcher::run(settings, &file, reread),
                None => Err(ConfigError::Missing { key: "mode", path: file }.into()),
            }
        }
        Command::CheckConfig(start) => check_config(start),
        Command::Dispatcher(Offline::Show(show)) => offline::show(&show),
        Command::Dispatcher(Offline::Restore(restore)) => offline::restore(restore),
        Command::Dispatcher(Offline::Verify(verify)) => offline::verify(verify),
        Command::Dispatcher(Offline::Mount(mount)) => serve::mount(&mount),
        Command::Dispatcher(Offline::Export(export)) => serve::export(&export),
        Command::Agent(Rescue::Restore(args)) => fetch::run(args),
        Command::Enroll(enroll) => enroll::run(enroll),
        Command::Untrack(untrack) => untrack::run(&untrack),
        Command::Thaw(thaw) => {
            for mount in freeze::record::thaw_leftovers(&thaw.state_dir)? {
                println!("thawed {}", mount.display());
            }
            Ok(())
        }
        Command::Generate { dir } => {
            generate::generate(Cli::command(), &dir).with_context(|| dir.display().to_string())
        }
        Command::FreezeGuard => Ok(()),
    }
}

/// Reads what `start` would be given, and nothing that it names.
fn check_config(start: Start) -> anyhow::Result<()> {
    let (settings, file) = Settings::load(start.settings, start.config.as_deref())?;
    match settings.mode {
        Some(Mode::Agent) => AgentConfig::new(settings, &file).map(drop)?,
        Some(Mode::Dispatcher) => DispatcherConfig::new(settings, &file).map(drop)?,
        None => return Err(ConfigError::Missing { key: "mode", path: file }.into()),
    }
    println!("{}: nothing is wrong", file.display());
    Ok(())
}

fn exit_code(error: &anyhow::Error) -> u8 {
    use ProblemKind::{
        AccessDenied, Damaged, InvalidArgument, NoSuchAgent, NoSuchCheckpoint, NoSuchDisk, Refused,
    };
    let usage = error.is::<ConfigError>() || error.is::<KeyError>() || error.is::<IdError>();
    let usage = usage || matches!(error.downcast_ref(), Some(DiskListError::Line { .. }));
    let fetch = error.downcast_ref::<FetchError>();
    let kind = error.downcast_ref().map(RestoreError::kind).or(fetch.and_then(FetchError::kind));
    match (kind, error.downcast_ref::<AgentError>()) {
        (Some(Refused | AccessDenied), _) => 3,
        (Some(InvalidArgument), _) => 2,
        (Some(Damaged), _) => 4,
        (Some(NoSuchAgent | NoSuchDisk | NoSuchCheckpoint), _) => 5,
        (_, Some(AgentError::Refused(_))) => 3,
        _ if usage => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let help = Cli::command().find_subcommand_mut("start").unwrap().render_long_help().to_string();
        assert!(help.contains(blxrep::config::DEFAULT_PATH), "the help names the default file");
    }

    #[test]
    fn a_verify_says_which_checkpoints() {
        let parse = |args: &str| {
            let line = format!("blxrep dispatcher verify --data-dir /d {args}");
            Cli::try_parse_from(line.split_whitespace().map(str::to_owned))
                .map(|_| ())
                .map_err(|e| e.exit_code())
        };
        for good in [
            "--agent a --checkpoint latest",
            "--agent a --disk b --checkpoint latest --checkpoint 202611212034",
            "--agent a --start 202611212034 --end 202611212035",
            "--start 202611212034",
            "--all",
            "--agent a --disk b --all",
        ] {
            assert_eq!(parse(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "--agent a",
            "--checkpoint latest",
            "--agent a --checkpoint latest --all",
            "--all --start 1",
            "--all --disk b",
        ] {
            assert_eq!(parse(bad), Err(2), "{bad}");
        }
    }
}
