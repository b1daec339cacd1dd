//! How a checkpoint was proven: pure.

use crate::checkpoint::Consistency;

/// What was seen in a final pass.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts {
    /// Mounted file systems on the disk, the read-only ones too.
    pub(super) mounted: usize,
    /// Those of them that are not read-only.
    pub(super) writable: usize,
    /// Those that we froze, and that were frozen until the last block was read.
    pub(super) frozen: usize,
    /// A freeze was on and ended too early.
    pub(super) expired: bool,
    /// The disk has (or may have) other users, or file systems came during the pass.
    pub(super) others: bool,
    /// Writes reached the disk during the pass.
    pub(super) written: bool,
    /// Hooks were run to prepare, and all went well.
    pub(super) hooked: bool,
}

impl Facts {
    /// The class that these facts prove.
    pub(super) fn consistency(self) -> Consistency {
        let all_frozen = self.mounted > 0 && self.frozen == self.writable && !self.others;
        match self {
            Self { written: true, .. } | Self { expired: true, .. } => Consistency::Fuzzy,
            _ if !all_frozen => Consistency::Crash,
            Self { hooked: true, .. } => Consistency::Application,
            _ => Consistency::Filesystem,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_proof_costs_its_class() {
        let best = Facts { mounted: 3, writable: 2, frozen: 2, hooked: true, ..Facts::default() };
        for (facts, want) in [
            (best, Consistency::Application),
            (Facts { hooked: false, ..best }, Consistency::Filesystem),
            (Facts { frozen: 1, ..best }, Consistency::Crash),
            (Facts { others: true, ..best }, Consistency::Crash),
            (Facts { mounted: 0, writable: 0, frozen: 0, ..best }, Consistency::Crash),
            (Facts { mounted: 1, writable: 0, frozen: 0, ..best }, Consistency::Application),
            (Facts { written: true, ..best }, Consistency::Fuzzy),
            (Facts { expired: true, ..best }, Consistency::Fuzzy),
            (Facts { written: true, others: true, ..best }, Consistency::Fuzzy),
        ] {
            assert_eq!(facts.consistency(), want, "{facts:?}");
        }
    }
}
