//! `blxrep enroll`.

use std::fs;

use anyhow::Context;
use blxrep::config::{DispatcherConfig, Settings};
use blxrep::wire::key::{AgentKey, Fetchable, enroll};
use blxrep::wire::tls::Identity;

/// Prints a new agent's key; the agents file keeps its hash.
pub(crate) fn run(args: super::Enroll) -> anyhow::Result<()> {
    let flags = Settings { data_dir: args.data_dir, agents_file: args.agents_file, ..Settings::default() };
    let (settings, file) = Settings::load(flags, None)?;
    let config = DispatcherConfig::new(settings, &file)?;
    fs::create_dir_all(&config.data_dir).with_context(|| config.data_dir.display().to_string())?;
    let identity = Identity::load_or_create(&config.data_dir)?;
    let key = AgentKey::generate(args.agent, identity.fingerprint())?;
    let fetchable = if args.no_restore { Fetchable::Nothing } else { Fetchable::OwnAnd(args.may_restore) };
    enroll(&config.agents_file, &key, &fetchable)?;
    println!("{}", key.to_line());
    Ok(())
}
