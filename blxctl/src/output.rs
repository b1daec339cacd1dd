//! Writing to standard output.

use std::io::{self, Write};

use crate::failure::Failure;

/// Writes and flushes. False if nobody reads any more, which is no failure: whoever read has seen enough.
pub(crate) fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::failed(format!("standard output: {e}"))),
    }
}

/// Writes text for people, or values for programs.
pub(crate) fn show(
    json: bool,
    value: impl FnOnce() -> serde_json::Value,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let text = if json { format!("{:#}\n", value()) } else { text() };
    print(&text).map(drop)
}
