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

use nix::errno::Errno;
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
        let polled = poll(&mut fds, PollTimeout::try_from(POLL).unwrap_or(PollTimeout::ZERO));
        match polled.map_err(io::Error::from).and_then(|_| self.0.accept()) {
            Ok((client, _)) => Ok(Some(client)),
            Err(e) if is_of_no_account(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Whether it only means that there is no client now: a signal came, or a client that was about to be accepted is gone. Of
/// that accept(2) tells as an error of the client's network.
fn is_of_no_account(error: &io::Error) -> bool {
    use nix::errno::Errno::*;
    matches!(
        Errno::from_raw(error.raw_os_error().unwrap_or_default()),
        EAGAIN
            | EINTR
            | ECONNABORTED
            | ENETDOWN
            | EPROTO
            | ENOPROTOOPT
            | EHOSTDOWN
            | ENONET
            | EHOSTUNREACH
            | EOPNOTSUPP
            | ENETUNREACH
            | EPERM
    )
}

/// Whether descriptors or memory are short, which may be over in a moment.
fn is_short(error: &io::Error) -> bool {
    use nix::errno::Errno::*;
    matches!(Errno::from_raw(error.raw_os_error().unwrap_or_default()), EMFILE | ENFILE | ENOBUFS | ENOMEM)
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
                Err(e) if is_short(&e) => {
                    warn!("an NBD client has to wait: {e}");
                    thread::sleep(POLL);
                    continue;
                }
                Err(e) => break Err(e),
            };
            number += 1;
            let clients = &clients;
            match admit(clients, number, &socket) {
                Ok(true) => {
                    let attend = move || attend(&socket, image, clients, number);
                    if let Err(e) = thread::Builder::new().spawn_scoped(scope, attend) {
                        clients.with(|all| all.remove(&number));
                        warn!("an NBD client was not let in: no thread for it: {e}");
                    }
                }
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

fn attend(socket: &Socket, image: &Image, clients: &Clients, number: u64) {
    let agreed = |stream: &Buffered<'_>| stream.0.get_ref().set_read_timeout(None);
    if let Err(e) = talk(&mut Buffered(BufReader::new(socket)), image, agreed) {
        debug!("an NBD client was disconnected: {e}");
    }
    clients.with(|all| all.remove(&number));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_does_not_come_ends_no_export() {
        let is = |judge: fn(&io::Error) -> bool, errno: i32| judge(&io::Error::from_raw_os_error(errno));
        for errno in [libc::EINTR, libc::EAGAIN, libc::ECONNABORTED, libc::EPROTO, libc::EHOSTUNREACH] {
            assert!(is(is_of_no_account, errno) && !is(is_short, errno), "{errno}");
        }
        assert!(is(is_short, libc::EMFILE) && !is(is_of_no_account, libc::EMFILE));
        for errno in [libc::EBADF, libc::EINVAL, libc::ENOTSOCK] {
            assert!(!is(is_of_no_account, errno) && !is(is_short, errno), "{errno}");
        }
        assert!(!is_of_no_account(&io::ErrorKind::Other.into()));
    }
}
