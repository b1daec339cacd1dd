//! Moves frames between one WebSocket and bounded queues until one side ends.

use std::future::Future;
use std::io::ErrorKind;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};

use super::socket::{DEAD_AFTER, PING_INTERVAL};

/// Frames waiting to be sent on one connection.
pub const OUTBOUND_MAX_FRAMES: usize = 4;
/// How long the last frames and the closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest one frame may take to be sent. Whoever takes nothing for so long must not hold up who sends to others.
const STALLED_AFTER: Duration = Duration::from_secs(60);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum PumpEnd {
    /// The other side closed it.
    #[error("the other side closed the connection")]
    Closed,
    /// This side closed it: its queue of frames to send has no sender any more.
    #[error("closed here")]
    ClosedHere,
    /// Whoever takes the frames is gone.
    #[error("nobody takes the frames any more")]
    Undeliverable,
    /// Nothing arrived for too long.
    #[error("nothing was heard for {} s", DEAD_AFTER.as_secs())]
    Silent,
    /// The other side takes nothing.
    #[error("the other side took nothing for {} s", STALLED_AFTER.as_secs())]
    Stalled,
    /// Something arrived that is not a binary frame.
    #[error("a text frame, where only binary ones are spoken")]
    Text,
    /// The connection broke, or a frame was too long.
    #[error("{0}")]
    Broken(Box<Error>),
}

impl From<Error> for PumpEnd {
    fn from(error: Error) -> Self {
        match error {
            Error::ConnectionClosed | Error::AlreadyClosed => Self::Closed,
            // A process that was killed says no goodbye, in TLS neither.
            Error::Io(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                Self::Closed
            }
            other => Self::Broken(Box::new(other)),
        }
    }
}

/// Sends what is in `outbound` and hands every binary frame to `deliver`, until the connection ends on either
/// side. `deliver` gives false if nobody takes frames any more. While it waits, nothing is read: that is how a slow
/// receiver slows the sender.
pub async fn pump<S, F, T>(
    socket: WebSocketStream<S>,
    outbound: mpsc::Receiver<Vec<u8>>,
    deliver: F,
) -> PumpEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Vec<u8>) -> T,
    T: Future<Output = bool>,
{
    let (sink, stream) = socket.split();
    // Two futures side by side: reading never waits for writing, so neither side can block the other for ever.
    tokio::select! {
        end = send(sink, outbound) => end,
        end = receive(stream, deliver) => end,
    }
}

async fn send<W>(mut sink: W, mut outbound: mpsc::Receiver<Vec<u8>>) -> PumpEnd
where
    W: SinkExt<Message, Error = Error> + Unpin,
{
    let mut pings = interval(PING_INTERVAL);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            frame = outbound.recv() => match frame {
                Some(frame) => Message::Binary(Bytes::from(frame)),
                None => {
                    let _ = timeout(CLOSE_TIMEOUT, sink.close()).await;
                    return PumpEnd::ClosedHere;
                }
            },
            _ = pings.tick() => Message::Ping(Bytes::new()),
        };
        match timeout(STALLED_AFTER, sink.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return PumpEnd::Stalled,
        }
    }
}

async fn receive<R, F, T>(mut stream: R, mut deliver: F) -> PumpEnd
where
    R: StreamExt<Item = Result<Message, Error>> + Unpin,
    F: FnMut(Vec<u8>) -> T,
    T: Future<Output = bool>,
{
    let mut heard = Instant::now();
    loop {
        match tokio::time::timeout_at(heard + DEAD_AFTER, stream.next()).await {
            Err(_) => return PumpEnd::Silent,
            Ok(None | Some(Ok(Message::Close(_)))) => return PumpEnd::Closed,
            Ok(Some(Err(error))) => return error.into(),
            Ok(Some(Ok(Message::Binary(frame)))) => {
                if !deliver(frame.into()).await {
                    return PumpEnd::Undeliverable;
                }
            }
            Ok(Some(Ok(Message::Text(_)))) => return PumpEnd::Text,
            Ok(Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)))) => {}
        }
        heard = Instant::now();
    }
}
