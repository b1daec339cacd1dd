//! A checkpoint as a network block device, for `nbdcopy`, `qemu-img`, QEMU and whatever else speaks NBD.
//!
//! One thread a client. Which part of the protocol is known is said in [`super::handshake`] and [`super::request`]. Who can
//! connect can read the whole disk: who may is a matter of the socket's place and rights.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};
use tracing::{debug, warn};

use super::POLL;
use super::connection::talk;
use super::image::Image;

/// Clients at the same time; one more is let go at once.
const CLIENTS_MAX: usize = 16;
/// How long a client may be silent before it has agreed on anything.
const SILENT_MAX: Duration = Duration::from_secs(10);

/// A socket that listens.
pub struct Listener(Socket);

impl Listener {
    /// Takes a socket that somebody has bound and listens on.
    ///
    /// # Errors
    /// InvalidInput if it is something else; what getsockopt(2) says.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = Socket::from(fd);
        let domain = socket.domain()?;
        let is_known = domain == Domain::UNIX || domain == Domain::IPV4 || domain == Domain::IPV6;
        if !is_known || socket.r#type()? != Type::STREAM || !socket.is_listener()? {
            let text = "this is no listening unix or TCP socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // A client that is gone again between poll and accept must not hold up the others.
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// The next client; `None` if there is none for a while.
    fn next(&self) -> io::Result<Option<Socket>> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(POLL).unwrap_or(PollTimeout::ZERO))?;
        match self.0.accept() {
            Ok((client, _)) => Ok(Some(client)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// The clients there are, so that they can be made to end.
#[derive(Default)]
struct Clients(Mutex<HashMap<u64, Socket>>);

impl Clients {
    fn with<T>(&self, change: impl FnOnce(&mut HashMap<u64, Socket>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves until `is_canceled`, which is asked several times a second. All clients are disconnected then.
///
/// # Errors
/// What poll(2) and accept(2) say.
pub fn serve(listener: &Listener, image: &Image, is_canceled: &dyn Fn() -> bool) -> io::Result<()> {
    let clients = Clients::default();
    thread::scope(|scope| {
        let mut number = 0;
        let result = loop {
            if is_canceled() {
                break Ok(());
            }
            let socket = match listener.next() {
                Ok(Some(socket)) => socket,
                Ok(None) => continue,
                // Descriptors may be short for a moment.
                Err(e) if e.raw_os_error().is_some_and(|e| [libc::EMFILE, libc::ENFILE].contains(&e)) => {
                    warn!("an NBD client has to wait: {e}");
                    thread::sleep(POLL);
                    continue;
                }
                Err(e) => break Err(e),
            };
            number += 1;
            let clients = &clients;
            match admit(clients, number, &socket) {
                Ok(true) => drop(scope.spawn(move || {
                    if let Err(e) = attend(&socket, image) {
                        debug!("an NBD client was disconnected: {e}");
                    }
                    clients.with(|all| all.remove(&number));
                })),
                Ok(false) => warn!("an NBD client was not let in: {CLIENTS_MAX} are connected"),
                Err(e) => debug!("an NBD client was not let in: {e}"),
            }
        };
        clients.with(|all| all.values().for_each(|client| drop(client.shutdown(Shutdown::Both))));
        result
    })
}

fn admit(clients: &Clients, number: u64, socket: &Socket) -> io::Result<bool> {
    socket.set_read_timeout(Some(SILENT_MAX))?;
    if socket.domain()? != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
        socket.set_keepalive(true)?;
    }
    let copy = socket.try_clone()?;
    Ok(clients.with(|all| {
        let has_room = all.len() < CLIENTS_MAX;
        if has_room {
            all.insert(number, copy);
        }
        has_room
    }))
}

/// Reads through a buffer, so that many small requests cost one call.
struct Buffered<'a>(BufReader<&'a Socket>);

impl Read for Buffered<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Buffered<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn attend(socket: &Socket, image: &Image) -> Result<(), super::connection::ClientError> {
    let agreed = |stream: &Buffered<'_>| stream.0.get_ref().set_read_timeout(None);
    talk(&mut Buffered(BufReader::new(socket)), image, agreed)
}
