//! Where log lines go: to the journal with their fields, or to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Begins logging; `BLXREP_LOG` holds another filter than `info`.
pub(crate) fn init() {
    let filter = EnvFilter::try_from_env("BLXREP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    // systemd sets JOURNAL_STREAM for what it connected to the journal (systemd.exec(5)).
    let color = std::io::stderr().is_terminal();
    let plain =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(color);
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(journal) => registry.with(journal.with_field_prefix(None)).init(),
        None => registry.with(plain).init(),
    }
}
