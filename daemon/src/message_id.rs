//! The journal's MESSAGE_ID of every event an operator would alert on (systemd.journal-fields(7)).
//!
//! `journalctl MESSAGE_ID=<id>` finds them, whatever their text says. They never change. README.md lists them.

/// Changes may have been missed: the disk is compared whole.
pub const GAP_FOUND: &str = "5538cbccf1f3429db1be4ac787417fde";
/// A checkpoint is no point in time.
pub const CHECKPOINT_FUZZY: &str = "8736ec6fc2014c93a50a0361088047fb";
/// A checkpoint did not come about.
pub const CHECKPOINT_FAILED: &str = "7027398e35434c9587cbc263d953f488";
/// Sectors of an agent's disk cannot be read: zeros stand for them.
pub const SECTORS_UNREADABLE: &str = "e4ba39e54d0146cf800259316040139b";
/// Stored data is damaged.
pub const DAMAGE_FOUND: &str = "36bf6280841042d98f4b6d42b81c2814";
/// A checkpoint was started in a virtual machine, and did not boot.
pub const BOOT_FAILED: &str = "aca2c55535ae4530814c4f13f8d91b1d";
/// An agent is not connected any more.
pub const AGENT_LOST: &str = "4c381d228baf43e1a50039cd1109d031";
/// A disk is not replicated: it is refused until a person has acted, or cannot be opened.
pub const DISK_GIVEN_UP: &str = "062429706bcc49228ea4217877467d29";
/// Two machines have one agent's key, or one was put back from an old image: one of them is refused.
pub const AGENT_FENCED: &str = "86a47908e304452b9e0fdb7dc12fdb62";

/// The data directory has too little space.
pub const NO_SPACE: &str = "3ff15c5fe0f44b70bfd3ecdd55d25a5f";

#[cfg(test)]
mod tests {
    #[test]
    fn the_readme_lists_every_id() {
        let (code, readme) = (include_str!("message_id.rs"), include_str!("../../README.md"));
        let ids: Vec<&str> = code.split('"').filter(|text| text.len() == 32).collect();
        assert_eq!(ids.len(), 10);
        assert!(ids.iter().all(|id| readme.contains(id)));
    }
}
