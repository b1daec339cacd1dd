//! What came of a start, and what is said about it. Pure.

use blxrep_dbus::words::BootResult;
use serde_json::{Value, json};

use super::console::Verdict;
use crate::failure::{Exit, Failure};

/// The last lines of a console that are shown of a start that failed.
const LINES_SHOWN: usize = 12;

/// What came of a start.
pub(crate) struct Proof {
    pub(super) agent: String,
    pub(super) disk: String,
    pub(super) checkpoint: String,
    pub(super) verdict: Verdict,
    pub(super) seconds: u64,
    pub(super) console: String,
}

impl Proof {
    pub(super) fn result(&self) -> BootResult {
        match self.verdict {
            Verdict::Up => BootResult::Passed,
            Verdict::Failed(_) => BootResult::Failed,
        }
    }

    /// For standard output; empty if it did not start.
    pub(crate) fn text(&self) -> String {
        let Self { agent, disk, checkpoint, seconds, .. } = self;
        match self.verdict {
            Verdict::Up => format!("checkpoint {checkpoint} of {agent}'s {disk}: boots, in {seconds} s\n"),
            Verdict::Failed(_) => String::new(),
        }
    }

    /// Why it is no success; `None` if it is one.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let Verdict::Failed(why) = &self.verdict else { return None };
        let Self { agent, disk, checkpoint, console, .. } = self;
        let mut message = format!("checkpoint {checkpoint} of {agent}'s {disk} does not boot: {why}");
        let lines: Vec<_> = console.lines().filter(|line| !line.trim().is_empty()).collect();
        for line in lines.iter().skip(lines.len().saturating_sub(LINES_SHOWN)) {
            message.push_str(&format!("\n  {line}"));
        }
        Some(Failure::new(Exit::Damaged, message))
    }

    pub(crate) fn json(&self) -> Value {
        let reason = match &self.verdict {
            Verdict::Up => None,
            Verdict::Failed(why) => Some(why),
        };
        json!({
            "agent": self.agent,
            "disk": self.disk,
            "checkpoint": self.checkpoint,
            "boot": self.result().as_str(),
            "reason": reason,
            "seconds": self.seconds,
            "console": self.console,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(verdict: Verdict) -> Proof {
        Proof {
            agent: "web1".into(),
            disk: "sda".into(),
            checkpoint: "20261121203456".into(),
            verdict,
            seconds: 15,
            console: (1..30).map(|n| format!("line {n}\n\n")).collect(),
        }
    }

    #[test]
    fn a_start_that_failed_shows_the_consoles_end_and_damage() {
        let failed = proof(Verdict::Failed("the kernel panicked".into()));
        let failure = failed.failure().unwrap();
        assert_eq!((failure.exit, failed.text().as_str()), (Exit::Damaged, ""));
        assert!(failure.message.starts_with(
            "checkpoint 20261121203456 of web1's sda does not boot: the kernel panicked\n  line 18\n"
        ));
        assert!(failure.message.ends_with("\n  line 29"));
        assert_eq!(
            (&failed.json()["boot"], &failed.json()["reason"]),
            (&json!("failed"), &json!("the kernel panicked"))
        );
    }

    #[test]
    fn a_start_that_came_up() {
        let passed = proof(Verdict::Up);
        assert_eq!(passed.text(), "checkpoint 20261121203456 of web1's sda: boots, in 15 s\n");
        assert_eq!(passed.failure(), None);
        assert_eq!((&passed.json()["boot"], &passed.json()["reason"]), (&json!("passed"), &Value::Null));
    }
}
