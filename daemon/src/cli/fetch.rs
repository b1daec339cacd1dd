//! `blxrep agent restore`: on a rescue system, with only this program and a key.

use anyhow::Context;
use blxrep::agent::fetch::{FetchError, FetchRequest, PATIENCE, fetch};
use blxrep::agent::link::Dial;
use blxrep::restore::{Output, check_empty};
use blxrep::wire::key::AgentKey;
use blxrep::wire::tls::connector;

use super::offline::{tell_restored, with_progress};

/// Restores a checkpoint to this machine.
pub(crate) fn run(args: super::FetchArgs) -> anyhow::Result<()> {
    super::log::init();
    let super::FetchArgs { dispatcher_addr, key_file, agent, disk, checkpoint, partition, .. } = args;
    let key = AgentKey::load(&key_file)?;
    let dial = Dial { addr: dispatcher_addr, connector: connector(key.fingerprint)?, key };
    let output = Output::Path(args.output);
    check_empty(&output, args.overwrite.as_deref())?;
    let request = FetchRequest { agent, disk, checkpoint, partition, output, patience: PATIENCE };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("the threads of the network")?;
    // Where no state directory is there is nothing to note it in; whoever ends it early is told.
    let done = with_progress(|progress| fetch(&dial, request, runtime.handle(), progress, &mut |_| Ok(())));
    if let Some(FetchError::Refused { damage, .. }) =
        done.as_ref().err().and_then(anyhow::Error::downcast_ref)
    {
        damage.iter().for_each(|line| eprintln!("{line}"));
    }
    tell_restored(&done?);
    Ok(())
}
