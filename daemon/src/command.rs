//! Asking a small program of the system, without ever waiting for it or storing what it says without bound.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Standard output of a program that is given `stdin`, ends within `timeout` and writes at most `max_bytes`, and how it ended.
///
/// # Errors
/// When it cannot be started, takes too long or writes too much; then it is killed.
pub(crate) fn ask(
    program: &str,
    args: &[&str],
    stdin: Stdio,
    timeout: Duration,
    max_bytes: usize,
) -> io::Result<(ExitStatus, Vec<u8>)> {
    let until = Instant::now() + timeout;
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{program}: {e}"));
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(named)?;
    let answer = listen(&mut child, until, max_bytes).and_then(|out| Ok((wait(&mut child, until)?, out)));
    if answer.is_err() {
        child.kill().ok();
        // It may hang in the kernel: then somebody else takes note of its end.
        std::thread::Builder::new().spawn(move || child.wait()).ok();
    }
    answer.map_err(named)
}

fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it did not end in time and was killed")
}

fn listen(child: &mut Child, until: Instant, max_bytes: usize) -> io::Result<Vec<u8>> {
    let mut pipe = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut out = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(out),
            Ok(len) if out.len() + len > max_bytes => return Err(io::Error::other("it says too much")),
            Ok(len) => out.extend_from_slice(buffer.get(..len).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).ok();
            }
            Err(e) => return Err(e),
        }
        if Instant::now() >= until {
            return Err(too_slow());
        }
    }
}

fn wait(child: &mut Child, until: Instant) -> io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= until {
            return Err(too_slow());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_it_says_and_how_it_ended_is_known() {
        let (status, out) = ask("sh", &["-c", "echo a; exit 3"], Stdio::null(), LONG, 10).unwrap();
        assert_eq!((status.code(), out.as_slice()), (Some(3), &b"a\n"[..]));
    }

    #[test]
    fn what_hangs_or_says_too_much_or_is_not_there_is_an_error() {
        let begin = Instant::now();
        for script in ["exec sleep 1000", "exec sleep 1000 >&-", "exec yes"] {
            assert!(
                ask("sh", &["-c", script], Stdio::null(), Duration::from_millis(200), 100_000_000_000)
                    .is_err(),
                "{script}"
            );
        }
        assert!(ask("yes", &[], Stdio::null(), LONG, 10_000).unwrap_err().to_string().contains("too much"));
        assert!(
            ask("no-such-program", &[], Stdio::null(), LONG, 10)
                .unwrap_err()
                .to_string()
                .contains("no-such-program")
        );
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
