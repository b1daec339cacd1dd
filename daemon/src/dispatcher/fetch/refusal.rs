//! What an agent is told of why it gets nothing: nothing of other agents, and no path of the dispatcher's. Pure.

use blxrep_dbus::problem::ProblemKind;

use crate::ids::AgentId;
use crate::restore::{Missing, RestoreError};
use crate::wire::message::{DAMAGE_MAX_LINES, clean_text};

/// Why a fetch ends before its end.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::dispatcher) struct Refusal {
    pub(in crate::dispatcher) kind: ProblemKind,
    pub(in crate::dispatcher) reason: String,
    pub(super) damage: Vec<String>,
}

impl Refusal {
    pub(super) fn new(kind: ProblemKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), damage: Vec::new() }
    }

    /// The agents file does not let this agent fetch what is of `of`. Does not tell whether there is anything.
    pub(super) fn not_allowed(agent: &AgentId, of: &AgentId) -> Self {
        let reason = if agent == of {
            "the dispatcher's agents file does not let this agent restore: restore on the dispatcher, or take the word \
             no-restore off its line there"
                .to_owned()
        } else {
            format!(
                "agent {agent} may not fetch checkpoints of agent {of}: if it is to, write restores:{of} behind its line in \
                 the dispatcher's agents file"
            )
        };
        Self::new(ProblemKind::Refused, reason)
    }

    /// It was ended by a person at the dispatcher.
    pub(super) fn canceled() -> Self {
        Self::new(ProblemKind::Canceled, "canceled on the dispatcher")
    }
}

impl From<RestoreError> for Refusal {
    /// What an agent may be told: nothing of other agents, and no path of the dispatcher's.
    fn from(error: RestoreError) -> Self {
        match (error.kind(), error) {
            (_, RestoreError::NotFound(Missing::Agent, _)) => {
                Self::new(ProblemKind::NoSuchAgent, "the dispatcher has stored nothing of this agent")
            }
            (_, RestoreError::NotFound(Missing::Disk, text)) => Self::new(ProblemKind::NoSuchDisk, text),
            (_, RestoreError::NotFound(Missing::Checkpoint, text)) => {
                Self::new(ProblemKind::NoSuchCheckpoint, text)
            }
            (_, RestoreError::Damaged(found)) => {
                let mut damage: Vec<String> =
                    found.iter().take(DAMAGE_MAX_LINES).map(|d| clean_text(d.to_string())).collect();
                if let (more @ 1.., Some(last)) =
                    (found.len().saturating_sub(DAMAGE_MAX_LINES), damage.last_mut())
                {
                    *last = format!("and {} more", more + 1);
                }
                let reason = "what the dispatcher has stored of this checkpoint is damaged: try an older one";
                Self { kind: ProblemKind::Damaged, reason: reason.to_owned(), damage }
            }
            (ProblemKind::Canceled, _) => Self::canceled(),
            (ProblemKind::InvalidArgument, error) => {
                Self::new(ProblemKind::InvalidArgument, error.to_string())
            }
            (_, error) => Self::new(ProblemKind::Failed, format!("the dispatcher failed: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Damage;
    use crate::wire::frame::encode_message;
    use crate::wire::message::RestoreDown;

    #[test]
    fn an_agent_is_told_nothing_of_others_and_no_path() {
        let found = RestoreError::NotFound(Missing::Agent, "nothing of web1; there is: web2 in /srv".into());
        let refusal = Refusal::from(found);
        assert_eq!(refusal.kind, ProblemKind::NoSuchAgent);
        assert!(!refusal.reason.contains("web2") && !refusal.reason.contains("/srv"), "{refusal:?}");
        let found = RestoreError::NotFound(Missing::Checkpoint, "there is no checkpoint x".into());
        assert_eq!(Refusal::from(found).kind, ProblemKind::NoSuchCheckpoint);
    }

    #[test]
    fn damage_is_listed_up_to_a_bound_and_fits_into_a_frame() {
        let damage = |count: usize| {
            let all = (0..count).map(|n| Damage::new(format!("{n}.bak"), "x".repeat(5000))).collect();
            Refusal::from(RestoreError::Damaged(all))
        };
        let all = damage(DAMAGE_MAX_LINES);
        assert_eq!((all.kind, all.damage.len()), (ProblemKind::Damaged, DAMAGE_MAX_LINES));
        assert!(all.damage.last().unwrap().starts_with("99.bak"));
        let Refusal { kind, reason, damage } = damage(DAMAGE_MAX_LINES + 50);
        assert_eq!((damage.len(), damage.last().unwrap().as_str()), (DAMAGE_MAX_LINES, "and 51 more"));
        assert!(encode_message(&RestoreDown::Refused { kind, reason, damage }).is_ok());
    }
}
