//! `blxrep untrack`.

use std::fs;

use anyhow::bail;
use blxrep::tracker::bpf::remove;
use blxrep::tracker::pins::agent_pin_path;

/// Removes an agent's pinned trackers.
pub(crate) fn run(args: &super::Untrack) -> anyhow::Result<()> {
    let dir = agent_pin_path(&args.id);
    let mut removed = 0;
    for entry in fs::read_dir(&dir).into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().replace(':', ".");
        if args.disk.as_ref().is_none_or(|disk| *disk == name) && remove(&entry.path())? {
            println!("{name} is not tracked any more");
            removed += 1;
        }
    }
    // Empty ones only.
    let _ = fs::remove_dir(&dir);
    let _ = dir.parent().map(fs::remove_dir);
    if removed == 0 {
        bail!("no disk of agent {} is tracked here (looked in {})", args.id, dir.display());
    }
    Ok(())
}
