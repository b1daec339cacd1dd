//! Which changes of a disk a person must accept before its agent may go on. Pure.
//!
//! What must never happen here: a disk let through that may be another one than the disk whose place it takes.

use crate::geometry::Geometry;
use crate::ids::{AgentId, DiskId};
use crate::wire::message::DiskOffer;

/// What is known of a disk that attaches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Known<'a> {
    /// The size and blocks of the newest checkpoint.
    pub committed: Option<Geometry>,
    /// Those of the full copy under way.
    pub copied: Option<Geometry>,
    /// The stored disk whose place it has taken.
    pub replaces: Option<&'a DiskId>,
    /// A person has accepted the change.
    pub accepted: bool,
}

/// The stored disk whose place an offered one has taken: it has the device name that the stored one had, which is offered no
/// more, and nothing is stored of the new one. `stored` are the agent's disks that have checkpoints, and their devices'
/// names.
pub fn in_place_of(offer: &DiskOffer, offers: &[DiskOffer], stored: &[(DiskId, String)]) -> Option<DiskId> {
    let is_stored = stored.iter().any(|(disk, _)| *disk == offer.disk);
    let is_gone = |disk: &DiskId| offers.iter().all(|offer| offer.disk != *disk);
    let old = stored.iter().find(|(disk, device)| *device == offer.device && is_gone(disk));
    old.filter(|_| !is_stored).map(|(disk, _)| disk.clone())
}

/// Whether a disk of this size may attach.
///
/// # Errors
/// A sentence for a person: why not, and what to do.
pub fn check(agent: &AgentId, disk: &DiskId, now: Geometry, known: Known<'_>) -> Result<(), String> {
    let Known { committed, copied, replaces, accepted } = known;
    let stored = committed.or(copied);
    if let Some(stored) = stored.filter(|stored| stored.block_shift() != now.block_shift()) {
        let (stored, now) = (stored.block_bytes(), now.block_bytes());
        return Err(format!(
            "the disk is stored in blocks of {stored} bytes, not of {now}: start the agent with block-size {stored}"
        ));
    }
    let why = match (committed, replaces) {
        (Some(committed), _) if now.size_bytes() < committed.size_bytes() => {
            let (old, new) = (committed.size_bytes(), now.size_bytes());
            format!("the disk shrank from {old} to {new} bytes")
        }
        (None, Some(old)) => {
            format!("the disk {disk} is in the place of {old}, whose checkpoints stay as they are")
        }
        _ => return Ok(()),
    };
    if accepted {
        return Ok(());
    }
    Err(format!(
        "{why}; nothing was changed here. If it is meant to be: 'blxctl accept {agent} --disk {disk}' on the dispatcher"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(size_bytes: u64) -> Geometry {
        Geometry::new(size_bytes, 12).unwrap()
    }

    fn id(disk: &str) -> DiskId {
        disk.parse().unwrap()
    }

    fn offer(disk: &str, device: &str) -> DiskOffer {
        DiskOffer { disk: id(disk), device: device.to_owned(), geometry: of(1 << 20) }
    }

    fn checked(now: Geometry, known: Known<'_>) -> Result<(), String> {
        check(&"web1".parse().unwrap(), &id("new"), now, known)
    }

    #[test]
    fn a_disk_may_grow_and_shrinks_only_when_accepted() {
        let known = Known { committed: Some(of(1 << 20)), ..Known::default() };
        assert_eq!(checked(of(1 << 20), known), Ok(()));
        assert_eq!(checked(of((1 << 20) + 512), known), Ok(()));
        let why = checked(of((1 << 20) - 512), known).unwrap_err();
        assert!(why.contains("shrank from 1048576 to 1048064 bytes"), "{why}");
        assert!(why.contains("'blxctl accept web1 --disk new'"), "{why}");
        assert_eq!(checked(of(512), Known { accepted: true, ..known }), Ok(()));
    }

    #[test]
    fn what_is_no_checkpoint_yet_may_have_any_size() {
        assert_eq!(checked(of(512), Known { copied: Some(of(1 << 20)), ..Known::default() }), Ok(()));
        assert_eq!(checked(of(512), Known::default()), Ok(()));
    }

    #[test]
    fn other_blocks_are_refused_whatever_was_accepted() {
        let now = Geometry::new(1 << 20, 9).unwrap();
        let known = Known { committed: Some(of(1 << 20)), accepted: true, ..Known::default() };
        assert!(checked(now, known).unwrap_err().contains("blocks of 4096 bytes"));
        let known = Known { committed: None, copied: Some(of(1 << 20)), ..known };
        assert!(checked(now, known).is_err());
    }

    #[test]
    fn another_disk_in_place_of_a_stored_one_is_copied_only_when_accepted() {
        let old = id("old");
        let known = Known { replaces: Some(&old), ..Known::default() };
        let why = checked(of(1 << 20), known).unwrap_err();
        assert!(why.contains("new is in the place of old") && why.contains("--disk new'"), "{why}");
        assert!(checked(of(1 << 20), Known { copied: Some(of(1 << 20)), ..known }).is_err());
        assert_eq!(checked(of(1 << 20), Known { accepted: true, ..known }), Ok(()));
        let known = Known { committed: Some(of(1 << 20)), ..known };
        assert_eq!(checked(of(1 << 20), known), Ok(()), "it has checkpoints of its own by now");
    }

    #[test]
    fn only_a_disk_that_is_gone_is_replaced() {
        let stored = [(id("a"), "sda".to_owned()), (id("b"), "sdb".to_owned())];
        let replaced = |offers: &[DiskOffer]| -> Vec<Option<DiskId>> {
            offers.iter().map(|offer| in_place_of(offer, offers, &stored)).collect()
        };
        assert_eq!(replaced(&[offer("new", "sda"), offer("b", "sdb")]), [Some(id("a")), None]);
        assert_eq!(replaced(&[offer("a", "sdb"), offer("b", "sda")]), [None, None], "found in another order");
        assert_eq!(
            replaced(&[offer("a", "sdb"), offer("new", "sda"), offer("b", "sdc")]),
            [None, None, None],
            "one more"
        );
        assert_eq!(replaced(&[offer("b", "sda")]), [None], "a stored disk under another's name");
        assert_eq!(replaced(&[offer("new", "sdc")]), [None], "another name: one more, and one less");
    }
}
