//! `blxrep enroll`.

use std::fs;

use anyhow::Context;
use blxrep::wire::key::{AgentKey, enroll};
use blxrep::wire::tls::Identity;

/// Prints a new agent's key; the agents file keeps its hash.
pub(crate) fn run(args: &super::Enroll) -> anyhow::Result<()> {
    fs::create_dir_all(&args.data_dir).with_context(|| args.data_dir.display().to_string())?;
    let identity = Identity::load_or_create(&args.data_dir)?;
    let key = AgentKey::generate(args.agent.clone(), identity.fingerprint())?;
    enroll(&args.agents_file, &key, !args.no_restore)?;
    println!("{}", key.to_line());
    Ok(())
}
