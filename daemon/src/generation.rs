//! Which machine an agent's name and key belong to. Pure.
//!
//! A key can be copied: with a cloned machine, or an image of one that is put back. So every session hands the agent a
//! *generation* that nobody else has, which it shows when it connects next. The agent shows only what it holds durably,
//! and not while it still writes an older offer; the dispatcher keeps a [`Ledger`] an agent, durable before a word is said.
//! Of several machines that show the same generation the first one to confirm its next one goes on; the others are
//! found when they connect, and a person decides ([`Ledger::accept`]).
//!
//! What must never happen here: two machines that both go on, or one lone machine that is refused.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::wire::key::{hex, unhex};

/// What one session hands to an agent, for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// Grows with every offer the dispatcher makes; from 1 on.
    pub number: u64,
    /// Random: who has it was given it, or is a copy of who was.
    pub token: [u8; 16],
}

/// Why an agent may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody was here before.
    First,
    /// It showed what it was given.
    Known,
    /// It showed nothing, but somebody had been given something: its state directory was lost.
    Reinstalled,
    /// It showed something newer than what is known here: the dispatcher runs on an old copy of its data.
    DispatcherBehind,
}

/// Why an agent may not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fenced {
    /// It showed a number that is over.
    #[error(
        "it shows generation {shown}, but generation {highest} was given out since: it is a copy of the machine, or was put back from an old image"
    )]
    Old {
        /// What it showed.
        shown: u64,
        /// The newest that was given out.
        highest: u64,
    },
    /// It showed the newest number, but not the token that counts.
    #[error(
        "it shows generation {shown}, but another machine goes on in its place: two machines have its key"
    )]
    Twin {
        /// What it showed.
        shown: u64,
    },
}

/// What is known of an agent's generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ledger {
    /// The highest number that was ever given out or shown by an agent that was let in.
    highest: u64,
    /// What the agent holds for certain.
    current: Option<Generation>,
    /// What it was given last, as long as it is not certain that it holds it.
    offered: Option<Generation>,
    /// What was refused last.
    refused: Option<Generation>,
}

/// Whether an agent that shows `shown` may go on.
///
/// # Errors
/// Why not.
pub fn decide(ledger: &Ledger, shown: Option<Generation>) -> Result<Standing, Fenced> {
    let Some(shown) = shown else {
        return Ok(if ledger.current.is_none() { Standing::First } else { Standing::Reinstalled });
    };
    if [ledger.current, ledger.offered].contains(&Some(shown)) {
        return Ok(Standing::Known);
    }
    let (shown, highest) = (shown.number, ledger.highest);
    match shown.cmp(&highest) {
        std::cmp::Ordering::Greater => Ok(Standing::DispatcherBehind),
        std::cmp::Ordering::Equal => Err(Fenced::Twin { shown }),
        std::cmp::Ordering::Less => Err(Fenced::Old { shown, highest }),
    }
}

impl Ledger {
    /// Lets an agent in that [`decide`] lets go on, and makes the generation that it is offered, of a new random token.
    /// What it showed is certain now, and what was offered before is void: the agent cannot come to hold it any more.
    pub fn offer(&mut self, shown: Option<Generation>, token: [u8; 16]) -> Generation {
        let number = self.highest.max(shown.map_or(0, |shown| shown.number)).saturating_add(1);
        let offer = Generation { number, token };
        self.current = shown.or(self.current);
        (self.highest, self.offered) = (number, Some(offer));
        offer
    }

    /// The agent holds what it was offered; false if that was something else.
    #[must_use]
    pub fn confirm(&mut self, held: Generation) -> bool {
        let is_offered = self.offered == Some(held);
        if is_offered {
            (self.current, self.offered) = (Some(held), None);
        }
        is_offered
    }

    /// An agent was refused. What it showed can be accepted from now on.
    pub fn refuse(&mut self, shown: Generation) {
        self.refused = Some(shown);
    }

    /// A person says that the machine that was refused last is the right one: it goes on, and every other one is
    /// refused from now on. `None` if none was refused.
    pub fn accept(&mut self) -> Option<Generation> {
        let accepted = self.refused.take()?;
        (self.current, self.offered) = (Some(accepted), None);
        Some(accepted)
    }

    /// What was refused last.
    pub fn refused(&self) -> Option<Generation> {
        self.refused
    }
}

/// A text that is no generation, or no ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct FormError(&'static str);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.number, hex(&self.token))
    }
}

impl FromStr for Generation {
    type Err = FormError;
    fn from_str(text: &str) -> Result<Self, FormError> {
        let parsed = text.split_once(':').and_then(|(number, token)| {
            Some(Self { number: number.parse().ok().filter(|n| *n > 0)?, token: unhex(token)? })
        });
        // Only the one spelling that Display makes.
        parsed
            .filter(|generation| generation.to_string() == text)
            .ok_or(FormError("'<number>:<32 hex digits>'"))
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.highest)?;
        [self.current, self.offered, self.refused].iter().try_for_each(|generation| match generation {
            Some(generation) => write!(f, " {generation}"),
            None => f.write_str(" -"),
        })
    }
}

impl FromStr for Ledger {
    type Err = FormError;
    fn from_str(text: &str) -> Result<Self, FormError> {
        let field = |text: &str| if text == "-" { Ok(None) } else { text.parse().map(Some) };
        let &[highest, current, offered, refused] = &*text.split(' ').collect::<Vec<_>>() else {
            return Err(FormError("'<highest> <current> <offered> <refused>'"));
        };
        let highest = highest.parse().map_err(|_| FormError("a number first"))?;
        Ok(Self { highest, current: field(current)?, offered: field(offered)?, refused: field(refused)? })
    }
}

#[cfg(test)]
mod tests;
