//! The connection of a fetch: a task moves frames from the socket into a bounded queue, and this thread takes them.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::FetchError;
use super::plan::QUESTIONS_MAX;
use crate::agent::link::Dial;
use crate::restore::{Meter, RestoreError};
use crate::wire::Endpoint;
use crate::wire::frame::encode_message;
use crate::wire::message::{Fetch, RestoreUp};
use crate::wire::pump::{OUTBOUND_MAX_FRAMES, PumpEnd, pump};

/// How often a wait for the network looks whether it is to end.
const POLL: Duration = Duration::from_millis(200);
/// How often the dispatcher is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How long the dispatcher may take to hear that all is done.
const LAST_WORD: Duration = Duration::from_secs(3);
/// Frames waiting to be sent: every question that can be open, and some news of the progress.
const OUT_MAX_FRAMES: usize = 2 * QUESTIONS_MAX;

/// One connection.
pub(super) struct Line {
    runtime: Handle,
    inbound: mpsc::Receiver<Vec<u8>>,
    /// Moves the frames; ends when it is dropped.
    pumping: JoinSet<PumpEnd>,
    out: mpsc::Sender<Vec<u8>>,
    told: Instant,
}

impl Line {
    /// Connects and says what is wanted.
    pub(super) fn open(
        dial: &Dial,
        wanted: &Fetch,
        runtime: &Handle,
        meter: &mut Meter<'_>,
    ) -> Result<Self, FetchError> {
        let socket = wait(runtime, meter, dial.open(Endpoint::Restore, &dial.headers()))??;
        let (out, outbound) = mpsc::channel(OUT_MAX_FRAMES);
        let (inbox, inbound) = mpsc::channel(OUTBOUND_MAX_FRAMES);
        let deliver = move |frame| {
            let inbox = inbox.clone();
            async move { inbox.send(frame).await.is_ok() }
        };
        let mut pumping = JoinSet::new();
        pumping.spawn_on(pump(socket, outbound, deliver), runtime);
        let line = Self { runtime: runtime.clone(), inbound, pumping, out, told: Instant::now() };
        line.tell(&RestoreUp::Fetch(wanted.clone()))?;
        Ok(line)
    }

    /// The next frame.
    pub(super) fn frame(&mut self, meter: &mut Meter<'_>) -> Result<Vec<u8>, FetchError> {
        if let Some(frame) = wait(&self.runtime, meter, self.inbound.recv())? {
            return Ok(frame);
        }
        let end = wait(&self.runtime, meter, self.pumping.join_next())?;
        let end = end.and_then(Result::ok).map_or_else(|| "it broke".to_owned(), |end| end.to_string());
        Err(FetchError::Cut { reason: end, hint: "" })
    }

    /// Sends without waiting: there is room for every question that can be open. That the connection is gone is seen
    /// where something is waited for.
    pub(super) fn tell<M: Serialize>(&self, message: &M) -> Result<(), FetchError> {
        let _ = self.out.try_send(encode_message(message)?);
        Ok(())
    }

    /// Tells how far it is, now and then.
    pub(super) fn tell_progress(&mut self, meter: &Meter<'_>) -> Result<(), FetchError> {
        if self.told.elapsed() < TELL_EVERY || self.out.capacity() <= QUESTIONS_MAX {
            return Ok(());
        }
        self.told = Instant::now();
        let (done_bytes, total_bytes) = meter.bytes();
        self.tell(&RestoreUp::Progress { done_bytes, total_bytes })
    }

    /// Says that all is done. Who is not there any more need not hear it.
    pub(super) fn finish(self) {
        let Self { runtime, out, mut pumping, inbound: _inbound, .. } = self;
        let _ = out.try_send(encode_message(&RestoreUp::Done).unwrap_or_default());
        drop(out);
        let _ = runtime.block_on(async { timeout(LAST_WORD, pumping.join_next()).await });
    }
}

/// Waits for something of the network's, and looks several times a second whether to end.
pub(super) fn wait<T>(
    runtime: &Handle,
    meter: &mut Meter<'_>,
    future: impl Future<Output = T>,
) -> Result<T, RestoreError> {
    let mut future = pin!(future);
    loop {
        if let Ok(done) = runtime.block_on(async { timeout(POLL, future.as_mut()).await }) {
            return Ok(done);
        }
        meter.tick(0)?;
    }
}
