//! Asking for a password in the terminal, where polkit wants one.
//!
//! On a desktop something else already does, and goes first (`--fallback`).

use std::io::{IsTerminal, Read};
use std::process::{Child, Command, Stdio};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getuid, pipe2};

/// polkit's text agent, until this is dropped.
pub(crate) struct AgentTty(Child);

impl AgentTty {
    /// Starts the agent and waits until polkit knows it. `None` where none is needed or can be had: the daemon's refusal
    /// then says what to do.
    pub(crate) fn start() -> Option<Self> {
        if getuid().is_root() || !std::io::stdin().is_terminal() {
            return None;
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC).ok()?;
        let mut command = Command::new("pkttyagent");
        command.args(["--process", &std::process::id().to_string()]).args(["--fallback", "--notify-fd", "1"]);
        // It talks to the terminal itself; its standard output is only what it closes when it is ready.
        let child = command.stdout(Stdio::from(write)).stderr(Stdio::null()).spawn().ok()?;
        // The command holds the write end as well.
        drop(command);
        let _ = std::fs::File::from(read).read(&mut [0]);
        Some(Self(child))
    }
}

impl Drop for AgentTty {
    fn drop(&mut self) {
        // Not SIGKILL: it puts the terminal's echo back first.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
        let _ = self.0.wait();
    }
}
