//! The bus interface of both roles: `org.blxrep.Manager`, one object a running job, one object a disk.
//!
//! Everything here is the same for agent and dispatcher; what they really do is behind [`control::Control`]. What must
//! never happen here: a call carried out that [`access`] did not allow, an option passed over that is not known, a blocking
//! call on an async thread.

pub mod control;
pub(crate) mod outcome;
mod which;
