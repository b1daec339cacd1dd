//! `/ws/restore`: streams a checkpoint of an agent's own disk to it, every block checked as it is read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::server::turned;
use crate::checkpoint::chain;
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::restore::verify::view;
use crate::run::Run;
use crate::store::StoreError;
use crate::store::files::RealFiles;
use crate::store::handle::Dir;
use crate::store::layout::Paths;
use crate::wire::frame::{Area, decode_message, encode_data, encode_message};
use crate::wire::message::{RestoreDown, RestoreUp, cut_text};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, pump};
use crate::wire::socket::ServerSocket;

/// Serves one connection until it is closed, or the session is cut.
pub async fn serve(
    socket: ServerSocket,
    data_dir: PathBuf,
    agent: AgentId,
    disk: DiskId,
    mut cut: watch::Receiver<bool>,
) {
    let (out, outbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
    let (asked, mut fetch) = mpsc::channel(1);
    let deliver = |frame: Vec<u8>| {
        // One fetch a connection: a second one, or anything else, ends it.
        let taken = decode_message(&frame)
            .is_ok_and(|RestoreUp::Fetch { checkpoint }| asked.try_send(checkpoint).is_ok());
        async move { taken }
    };
    let streaming = async {
        if let Some(checkpoint) = fetch.recv().await {
            let (agent, disk) = (agent.clone(), disk.clone());
            let _ = spawn_blocking(move || answer(&data_dir, agent, disk, checkpoint, out)).await;
        }
        // The queue is dropped: what is in it is sent, then the connection is closed.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        end = pump(socket, outbound, deliver) => info!(AGENT = %agent, DISK = %disk, "a fetch ended: {end}"),
        () = streaming => {}
        () = turned(&mut cut) => {}
    }
}

fn answer(
    data_dir: &Path,
    agent: AgentId,
    disk: DiskId,
    wanted: Option<CheckpointId>,
    out: mpsc::Sender<Vec<u8>>,
) {
    let result = stream(data_dir, agent.clone(), disk.clone(), wanted, &out);
    let last = match result {
        Ok(None) => RestoreDown::Refused { reason: "there is no such checkpoint".to_owned() },
        Ok(Some(())) => RestoreDown::End,
        Err(error) => {
            warn!(AGENT = %agent, DISK = %disk, "a fetch failed: {error}");
            RestoreDown::Refused { reason: cut_text(error.to_string()) }
        }
    };
    send(&out, encode_message(&last).unwrap_or_default());
}

fn send(out: &mpsc::Sender<Vec<u8>>, frame: Vec<u8>) -> bool {
    out.blocking_send(frame).is_ok()
}

fn stream(
    data_dir: &Path,
    agent: AgentId,
    disk: DiskId,
    wanted: Option<CheckpointId>,
    out: &mpsc::Sender<Vec<u8>>,
) -> Result<Option<()>, StoreError> {
    let dir = Dir::new(Arc::new(RealFiles::new(data_dir)));
    let owner = Paths::new(agent, disk);
    let chain = chain::load(&dir, &owner)?;
    let at = chain.members.iter().rposition(|member| wanted.is_none_or(|id| id == member.checkpoint.id));
    let Some((at, member)) = at.and_then(|at| Some((at, chain.members.get(at)?))) else { return Ok(None) };
    let (checkpoint, geometry) = (member.checkpoint.id, member.checkpoint.geometry);
    let mut view = view(&dir, &owner, &chain, at + 1)?;
    send(out, encode_message(&RestoreDown::Begin { checkpoint, geometry }).unwrap_or_default());
    for group in 0..geometry.groups() {
        let (first, count) = geometry.group_extent(group);
        let run = match view.read_group(group)? {
            Some(data) => Run::pack(first, data.hashes, &data.data),
            None => Run::zeros(first, u32::try_from(count).unwrap_or(u32::MAX)),
        };
        if !send(out, encode_data(Area::Base, group + 1, &run)) {
            break;
        }
    }
    Ok(Some(()))
}
