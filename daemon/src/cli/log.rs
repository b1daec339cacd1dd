//! Where log lines go: to the journal with their fields, or to standard error.

use std::io::IsTerminal;

use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Begins logging; `BLXREP_LOG` holds another filter than `info`. What fuser says is said better here.
pub(crate) fn init() {
    let filter = EnvFilter::try_from_env("BLXREP_LOG").unwrap_or_else(|_| EnvFilter::new("info,fuser=error"));
    let registry = tracing_subscriber::registry().with(filter);
    // systemd sets JOURNAL_STREAM for what it connected to the journal (systemd.exec(5)).
    let color = std::io::stderr().is_terminal();
    let plain = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(color)
        .fmt_fields(debug_fn(plain_field).delimited(" "));
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(journal) => registry.with(journal.with_field_prefix(None)).init(),
        None => registry.with(plain).init(),
    }
}

/// A field for people: a MESSAGE_ID says nothing to them.
fn plain_field(out: &mut Writer<'_>, field: &Field, value: &dyn std::fmt::Debug) -> std::fmt::Result {
    match field.name() {
        "MESSAGE_ID" => Ok(()),
        "message" => write!(out, "{value:?}"),
        name => write!(out, "{name}={value:?}"),
    }
}
