//! WebSockets over TLS: the upgrade on both sides, and limits of what is accepted.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config, client_async_with_config};

use super::frame::FRAME_MAX_BYTES;
use super::{Endpoint, header, tls};

/// A connection must be up, TLS and upgrade included, after this time.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Each side sends a ping this often where nothing else is sent.
pub const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A connection on which nothing arrived for this long is dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(20);

/// The agent's end of a connection.
pub type ClientSocket = WebSocketStream<client::TlsStream<TcpStream>>;
/// The dispatcher's end of a connection.
pub type ServerSocket = WebSocketStream<server::TlsStream<TcpStream>>;

/// A connection that did not come up.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers, or not in time.
    #[error("{addr} cannot be reached: {source}")]
    Unreachable {
        /// Host and port.
        addr: String,
        /// Why.
        source: io::Error,
    },
    /// The other end is not the dispatcher this agent was enrolled with.
    #[error(
        "the dispatcher at {addr} shows another certificate than the one in the key file: if its certificate was replaced on purpose, enroll this agent again; if not, somebody stands between"
    )]
    Fingerprint {
        /// Host and port.
        addr: String,
    },
    /// The dispatcher refused the upgrade.
    #[error("the dispatcher at {addr} refused: {reason}")]
    Refused {
        /// Host and port.
        addr: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        reason: String,
    },
    /// TLS or WebSocket broke.
    #[error("the connection to {addr} failed: {reason}")]
    Protocol {
        /// Host and port.
        addr: String,
        /// Why.
        reason: String,
    },
}

fn limits() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(FRAME_MAX_BYTES))
        .max_frame_size(Some(FRAME_MAX_BYTES))
        .write_buffer_size(0)
        .max_write_buffer_size(4 * FRAME_MAX_BYTES)
}

/// Connects to an endpoint.
///
/// # Errors
/// When the dispatcher cannot be reached in time, is not the pinned one, or refuses.
pub async fn connect(
    addr: &str,
    connector: &TlsConnector,
    endpoint: Endpoint,
    headers: &[(&'static str, String)],
) -> Result<ClientSocket, ConnectError> {
    let slow = || ConnectError::Unreachable { addr: addr.to_owned(), source: io::ErrorKind::TimedOut.into() };
    timeout(CONNECT_TIMEOUT, connect_now(addr, connector, endpoint, headers)).await.map_err(|_| slow())?
}

async fn connect_now(
    addr: &str,
    connector: &TlsConnector,
    endpoint: Endpoint,
    headers: &[(&'static str, String)],
) -> Result<ClientSocket, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { addr: addr.to_owned(), source };
    let protocol = |reason: String| ConnectError::Protocol { addr: addr.to_owned(), reason };
    let tcp = TcpStream::connect(addr).await.map_err(unreachable)?;
    let _ = tcp.set_nodelay(true);
    let name = ServerName::from(tcp.peer_addr().map_err(unreachable)?.ip());
    let stream = match connector.connect(name, tcp).await {
        Ok(stream) => stream,
        Err(e) if tls::is_wrong_fingerprint(&e) => {
            return Err(ConnectError::Fingerprint { addr: addr.to_owned() });
        }
        Err(e) => return Err(protocol(e.to_string())),
    };
    let url = format!("wss://{addr}{endpoint}");
    let mut request = url.into_client_request().map_err(|e| protocol(e.to_string()))?;
    for (name, value) in headers {
        let value = HeaderValue::from_str(value).map_err(|e| protocol(e.to_string()))?;
        request.headers_mut().insert(HeaderName::from_static(name), value);
    }
    match client_async_with_config(request, stream, Some(limits())).await {
        Ok((socket, _)) => Ok(socket),
        Err(WsError::Http(response)) => {
            let said = response.headers().get(header::REASON).and_then(|v| v.to_str().ok());
            let reason = said.unwrap_or("no reason given").chars().take(300).collect();
            Err(ConnectError::Refused { addr: addr.to_owned(), status: response.status().as_u16(), reason })
        }
        Err(e) => Err(protocol(e.to_string())),
    }
}

/// What a client asked for in its upgrade.
#[derive(Debug)]
pub struct Upgrade {
    /// The endpoint.
    pub endpoint: Endpoint,
    headers: HeaderMap,
}

impl Upgrade {
    /// The value of a header, if there is exactly one that is plain text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.get_all(name).iter();
        let value = values.next()?.to_str().ok()?;
        values.next().is_none().then_some(value)
    }

    /// The secret of the `Authorization: Bearer` header.
    pub fn bearer(&self) -> Option<&str> {
        self.header("authorization")?.strip_prefix("Bearer ")
    }
}

/// Why an upgrade is refused.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// A sentence for the agent's operator; plain ASCII.
    pub reason: String,
}

/// Accepts a connection: TLS, then the upgrade if `admit` lets it in.
///
/// # Errors
/// When TLS or the upgrade fails, is refused, or takes too long.
pub async fn accept<T>(
    tcp: TcpStream,
    acceptor: &TlsAcceptor,
    peer: IpAddr,
    admit: impl FnOnce(&Upgrade) -> Result<T, Refusal> + Unpin,
) -> io::Result<(ServerSocket, Endpoint, T)> {
    let slow = |_| io::Error::new(io::ErrorKind::TimedOut, format!("{peer} did not finish its handshake"));
    timeout(CONNECT_TIMEOUT, accept_now(tcp, acceptor, admit)).await.map_err(slow)?
}

async fn accept_now<T>(
    tcp: TcpStream,
    acceptor: &TlsAcceptor,
    admit: impl FnOnce(&Upgrade) -> Result<T, Refusal> + Unpin,
) -> io::Result<(ServerSocket, Endpoint, T)> {
    let _ = tcp.set_nodelay(true);
    let stream = acceptor.accept(tcp).await?;
    let mut admitted = None;
    let mut admit = Some(admit);
    #[allow(clippy::result_large_err, reason = "the type is tungstenite's")]
    let callback = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        let Some(admit) = admit.take() else { return Err(refuse(500, "asked twice")) };
        let endpoint = request.uri().path().parse().map_err(|()| refuse(404, "no such endpoint"))?;
        let upgrade = Upgrade { endpoint, headers: request.headers().clone() };
        let value = admit(&upgrade).map_err(|r| refuse(r.status, &r.reason))?;
        admitted = Some((endpoint, value));
        Ok(response)
    };
    let socket =
        accept_hdr_async_with_config(stream, callback, Some(limits())).await.map_err(io::Error::other)?;
    let (endpoint, value) = admitted.ok_or_else(|| io::Error::other("the upgrade was not admitted"))?;
    Ok((socket, endpoint, value))
}

fn refuse(status: u16, reason: &str) -> ErrorResponse {
    let mut response = ErrorResponse::new(None);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    if let Ok(value) = HeaderValue::from_str(reason) {
        response.headers_mut().insert(HeaderName::from_static(header::REASON), value);
    }
    response
}
