//! The agent's side of the protocol, spoken by hand.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test ends so")]

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use blxrep::agent::link::Dial;
use blxrep::generation::Generation;
use blxrep::geometry::Geometry;
use blxrep::wire::frame::{decode_message, encode_message};
use blxrep::wire::key::{AgentKey, hex};
use blxrep::wire::message::{ConfigDown, ConfigUp, DiskOffer};
use blxrep::wire::socket::ClientSocket;
use blxrep::wire::{Endpoint, header, tls};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::lab::Lab;

pub fn dial(lab: &Lab, agent: &str) -> Dial {
    let key = AgentKey::load(Path::new(&lab.path(&format!("{agent}.key")))).unwrap();
    let addr = format!("127.0.0.1:{}", lab.port).parse().unwrap();
    Dial { addr, connector: tls::connector(key.fingerprint).unwrap(), key }
}

pub async fn send(socket: &mut ClientSocket, bytes: Vec<u8>) {
    socket.send(Message::Binary(Bytes::from(bytes))).await.unwrap();
}

/// The next binary frame; `None` when the connection ends.
pub async fn next(socket: &mut ClientSocket) -> Option<Vec<u8>> {
    loop {
        match tokio::time::timeout(std::time::Duration::from_secs(10), socket.next())
            .await
            .expect("no answer")
        {
            Some(Ok(Message::Binary(bytes))) => return Some(bytes.into()),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
            Some(Ok(_)) => {}
        }
    }
}

/// Says hello with one disk; waits for a session before to end. Gives the connection and the answer.
pub async fn hello(
    dial: &Dial,
    disk: &str,
    geometry: Geometry,
    generation: Option<Generation>,
) -> (ClientSocket, ConfigDown) {
    let mut tries = 0;
    let mut config = loop {
        match dial.open(Endpoint::Config, &dial.headers()).await {
            Ok(config) => break config,
            Err(error) => assert!(tries < 100, "{error}"),
        }
        tries += 1;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    };
    let disks = vec![DiskOffer { disk: disk.parse().unwrap(), device: disk.to_owned(), geometry }];
    let hello = ConfigUp::Hello { software: "test".into(), boot_id: "x".into(), disks, generation };
    send(&mut config, encode_message(&hello).unwrap()).await;
    let answer = decode_message(&next(&mut config).await.unwrap()).unwrap();
    (config, answer)
}

/// Begins a session of a newly installed agent that offers one disk. Gives its connection and its token.
pub async fn session(dial: &Dial, disk: &str, geometry: Geometry) -> (ClientSocket, [u8; 16]) {
    let (mut config, answer) = hello(dial, disk, geometry, None).await;
    let ConfigDown::Offer(generation) = answer else { panic!("{answer:?}") };
    send(&mut config, encode_message(&ConfigUp::Holds(generation)).unwrap()).await;
    let paused: ConfigDown = decode_message(&next(&mut config).await.unwrap()).unwrap();
    assert_eq!(paused, ConfigDown::Paused(Vec::new()), "before the welcome");
    let welcome = decode_message(&next(&mut config).await.unwrap()).unwrap();
    let ConfigDown::Welcome { session } = welcome else { panic!("{welcome:?}") };
    (config, session)
}

static LINKS: AtomicU64 = AtomicU64::new(1);

/// The headers of the two connections of one attachment of a disk.
pub fn disk_headers(dial: &Dial, session: [u8; 16], disk: &str) -> Vec<(&'static str, String)> {
    let mut headers = dial.headers();
    headers.extend([
        (header::SESSION, hex(&session)),
        (header::DISK, disk.to_owned()),
        (header::LINK, LINKS.fetch_add(1, Ordering::Relaxed).to_string()),
    ]);
    headers
}
