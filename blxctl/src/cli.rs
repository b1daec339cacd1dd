//! What a person may type.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use blxrep_dbus::words::Role;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::help;

/// Ask and order the blxrep daemons of this host, over the system bus
#[derive(Debug, Parser)]
#[command(name = "blxctl", version, after_long_help = help::HELP, max_term_width = 110, subcommand_value_name = "COMMAND")]
pub(crate) struct Cli {
    /// Which daemon, if both run here [default: the dispatcher; for status, both]
    #[arg(long, global = true, value_parser = roles(), value_name = "ROLE", help_heading = "Global options")]
    pub(crate) role: Option<Role>,
    /// For programs
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

fn roles() -> impl TypedValueParser<Value = Role> {
    let words: Vec<_> = Role::ALL.iter().map(|role| role.as_str()).collect();
    PossibleValuesParser::new(words).try_map(|word| word.parse::<Role>().map_err(|_| "no such role"))
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Is every disk protected, and what is to be done if not
    #[command(after_long_help = help::STATUS)]
    Status,
    /// List the agents
    #[command(after_long_help = help::AGENTS)]
    Agents,
    /// List the disks
    #[command(after_long_help = help::DISKS)]
    Disks {
        /// Only this agent's
        agent: Option<String>,
    },
    /// List checkpoints, oldest first
    #[command(after_long_help = help::SHOW)]
    Show {
        #[command(flatten)]
        disks: Disks,
        /// Not before this minute, YYYYMMDDHHMM in UTC
        #[arg(long, value_name = "MINUTE")]
        start: Option<String>,
        /// Not after this minute, YYYYMMDDHHMM in UTC
        #[arg(long, value_name = "MINUTE")]
        end: Option<String>,
    },
    /// Bring a checkpoint back into a new file or onto a block device
    #[command(after_long_help = help::RESTORE)]
    Restore {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        target: RestoreTarget,
        /// Only this partition of the disk, by its number
        #[arg(long, value_name = "NUMBER")]
        partition: Option<u32>,
        /// The target once more, if what a device holds is to be overwritten
        #[arg(long, value_name = "TARGET")]
        overwrite: Option<PathBuf>,
        /// As what a file is made
        #[arg(long, value_enum, default_value_t = Format::Raw)]
        format: Format,
        #[command(flatten)]
        wait: Wait,
    },
    /// Read all that one, some or all checkpoints rest on, and check it; only on the dispatcher
    #[command(after_long_help = help::VERIFY)]
    Verify {
        #[command(flatten)]
        which: Several,
        #[command(flatten)]
        start: Start,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show a checkpoint's disk and partitions as files; only on the dispatcher
    #[command(after_long_help = help::MOUNT)]
    Mount {
        #[command(flatten)]
        shown: Shown,
        /// An empty directory
        dir: PathBuf,
    },
    /// Unmount what 'mount' mounted
    #[command(after_long_help = help::UMOUNT)]
    Umount {
        /// The directory
        dir: PathBuf,
    },
    /// Show a checkpoint's disk as a network block device; only on the dispatcher
    #[command(after_long_help = help::EXPORT)]
    Export {
        #[command(flatten)]
        shown: Shown,
        #[command(flatten)]
        address: Address,
        /// Let clients write, into a file in /var/tmp that is thrown away
        #[arg(long)]
        writable: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Start a checkpoint in QEMU, for a look or for real; only on the dispatcher
    #[command(after_long_help = help::BOOT)]
    Boot {
        #[command(flatten)]
        shown: Shown,
        /// More arguments of QEMU
        #[arg(last = true)]
        qemu: Vec<OsString>,
    },
    /// Take a checkpoint now
    #[command(after_long_help = help::SYNC)]
    Sync {
        #[command(flatten)]
        disks: Disks,
        /// Compare the whole disk first
        #[arg(long)]
        compare: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Accept a machine that is refused, or a disk that shrank or was replaced; only on the dispatcher
    #[command(after_long_help = help::ACCEPT)]
    Accept {
        /// Whose machine or disk
        agent: String,
        /// Only this disk: its id or its device's name
        #[arg(long)]
        disk: Option<String>,
    },
    /// Stop sending
    #[command(after_long_help = help::PAUSE)]
    Pause(Disks),
    /// Send again
    #[command(after_long_help = help::RESUME)]
    Resume(Disks),
    /// List the jobs that run
    #[command(after_long_help = help::JOBS)]
    Jobs,
    /// Cancel a job
    #[command(after_long_help = help::CANCEL)]
    Cancel {
        /// Its number, as 'jobs' shows it
        job: u32,
    },
    /// Print what happens, line by line
    #[command(after_long_help = help::WATCH)]
    Watch,
    /// Write man pages and completions
    #[command(hide = true)]
    Generate {
        /// Where to
        dir: PathBuf,
    },
}

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The disk's bytes, with holes for zeros
    Raw,
    /// QEMU's, made by qemu-img; only on the dispatcher
    Qcow2,
}

/// An agent's disks.
#[derive(Debug, Args)]
pub(crate) struct Disks {
    /// Whose disks
    pub(crate) agent: Option<String>,
    /// Only this disk: its id or its device's name
    #[arg(long)]
    pub(crate) disk: Option<String>,
}

/// A checkpoint.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Whose checkpoint
    #[arg(long)]
    pub(crate) agent: Option<String>,
    /// Of which disk, its id or its device's name; needed if the agent has several
    #[arg(long)]
    pub(crate) disk: Option<String>,
    /// YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    pub(crate) checkpoint: String,
}

/// Checkpoints.
#[derive(Debug, Args)]
pub(crate) struct Several {
    /// Whose; everybody's with --start, --end or --all and without it
    #[arg(long)]
    pub(crate) agent: Option<String>,
    /// Of which disk, its id or its device's name; needed with CHECKPOINT if the agent has several
    #[arg(long)]
    pub(crate) disk: Option<String>,
    /// YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    #[arg(required_unless_present_any = ["start", "end", "all", "boot"], conflicts_with_all = ["start", "end", "all"])]
    pub(crate) checkpoint: Vec<String>,
    /// All not before this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE", conflicts_with = "all")]
    pub(crate) start: Option<String>,
    /// All not after this minute, YYYYMMDDHHMM in UTC
    #[arg(long, value_name = "MINUTE", conflicts_with = "all")]
    pub(crate) end: Option<String>,
    /// All there are
    #[arg(long)]
    pub(crate) all: bool,
}

/// Whether, and how, to start a checkpoint.
#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Start it in QEMU instead, and wait for a login prompt; CHECKPOINT may be left out for the newest
    #[arg(long, conflicts_with_all = ["start", "end", "all", "no_wait"])]
    pub(crate) boot: bool,
    /// Wait for the line 'blxrep-probe: ok' on the serial console
    #[arg(long, requires = "boot")]
    pub(crate) probe: bool,
    /// How long to wait
    #[arg(long, value_name = "SECONDS", requires = "boot", default_value = "600", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) boot_timeout: u64,
    /// More arguments of QEMU, with --boot
    #[arg(last = true, requires = "boot")]
    pub(crate) qemu: Vec<OsString>,
}

/// A checkpoint to show.
#[derive(Debug, Args)]
pub(crate) struct Shown {
    /// Whose checkpoint
    pub(crate) agent: String,
    /// YYYYMMDDHHMMSS, YYYYMMDDHHMM for the newest of a minute, or 'latest'
    pub(crate) checkpoint: String,
    /// Of which disk, its id or its device's name; needed if the agent has several
    #[arg(long)]
    pub(crate) disk: Option<String>,
}

/// Where to listen.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Address {
    /// Listen on a new unix socket of this name
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on TCP, on this address and port only
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) tcp: Option<SocketAddr>,
}

/// Whether to wait for a job.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Print the job's number and path, and leave it running
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// Where a restore goes.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct RestoreTarget {
    /// A new file, or a block device that is not in use
    target: Option<PathBuf>,
    /// The same, as 'blxrep dispatcher restore' is told
    #[arg(long, value_name = "TARGET")]
    output: Option<PathBuf>,
}

impl RestoreTarget {
    /// The one that was given.
    pub(crate) fn path(self) -> PathBuf {
        self.target.or(self.output).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_sound_and_every_command_has_examples() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands_mut().filter(|sub| !sub.is_hide_set()) {
            let name = sub.get_name().to_owned();
            let help = sub.render_long_help().to_string();
            assert!(help.contains("\nExamples:\n  blxctl "), "{name}");
            assert!(help.contains("\nJSON:\n"), "{name}");
        }
    }

    #[test]
    fn a_restore_has_one_form_for_both_roles() {
        let cli =
            parse("blxctl restore latest /dev/sdb --agent web1 --disk sda --role dispatcher --json").unwrap();
        assert_eq!((cli.role, cli.json), (Some(Role::Dispatcher), true));
        let Command::Restore { which, target, wait, .. } = cli.command else { unreachable!() };
        let target = target.path();
        assert_eq!((which.agent.as_deref(), which.disk.as_deref()), (Some("web1"), Some("sda")));
        assert_eq!((which.checkpoint.as_str(), target, wait.no_wait), ("latest", "/dev/sdb".into(), false));
        let Command::Restore { which, .. } = parse("blxctl restore latest x.img").unwrap().command else {
            unreachable!()
        };
        assert_eq!(which.agent, None);
        let named = parse("blxctl restore latest --output x.img").unwrap().command;
        let Command::Restore { target, .. } = named else { unreachable!() };
        assert_eq!(target.path(), Path::new("x.img"));
    }

    #[test]
    fn an_agent_is_an_argument_of_what_is_about_an_agent() {
        for verb in ["show", "sync", "pause", "resume", "disks"] {
            assert!(parse(&format!("blxctl {verb}")).is_ok());
            assert!(parse(&format!("blxctl {verb} web1")).is_ok());
            assert!(parse(&format!("blxctl {verb} web1 db1")).is_err(), "{verb}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "blxctl",
            "blxctl restore latest",
            "blxctl restore latest x.img --output y.img",
            "blxctl restore web1 latest x.img",
            "blxctl restore latest x.img --format vmdk",
            "blxctl status web1",
            "blxctl --role both status",
            "blxctl cancel seven",
            "blxctl cancel -1",
            "blxctl pause --no-wait",
            "blxctl accept",
            "blxctl accept web1 --compare",
            "blxctl verify",
            "blxctl verify --agent web1",
            "blxctl verify latest --all",
            "blxctl verify latest --start 202611210000",
            "blxctl verify --all --end 202611210000",
            "blxctl verify --boot --all",
            "blxctl verify --boot --no-wait",
            "blxctl verify latest --probe",
            "blxctl verify latest --boot-timeout 5",
            "blxctl verify --boot --boot-timeout 0",
            "blxctl verify latest -- -m 8G",
            "blxctl boot web1",
            "blxctl boot web1 latest -m 8G",
            "blxctl mount web1 latest",
            "blxctl export web1 latest",
            "blxctl export web1 latest --socket /x --tcp 127.0.0.1:1",
            "blxctl export web1 latest --tcp 10809",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
