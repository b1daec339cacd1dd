//! `blxrep dispatcher show` and `blxrep dispatcher restore`: only a data directory is needed.

use std::io::{IsTerminal, Write};

use anyhow::Context;
use blxrep::checkpoint::select::parse_minute;
use blxrep::restore::{
    RestoreError, RestoreOptions, ShowRow, restore as restore_checkpoint, show as show_rows,
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

fn minute(text: Option<&str>, flag: &str) -> Result<Option<u64>, RestoreError> {
    let wrong =
        |text: &str| RestoreError::Usage(format!("--{flag} {text:?}: YYYYMMDDHHMM in UTC is expected"));
    text.map(|text| parse_minute(text).ok_or_else(|| wrong(text))).transpose()
}

/// Lists checkpoints.
pub(crate) fn show(args: &super::Show) -> anyhow::Result<()> {
    let start = minute(args.start.as_deref(), "start")?;
    let end = minute(args.end.as_deref(), "end")?;
    let rows = show_rows(&args.data_dir, &args.agent, args.disk.as_deref(), start, end)?;
    let mut out = std::io::stdout().lock();
    let written = if args.json {
        serde_json::to_writer_pretty(&mut out, &rows)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        table(&mut out, &rows)
    };
    match written {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

fn table(out: &mut impl Write, rows: &[ShowRow]) -> std::io::Result<()> {
    if rows.is_empty() {
        return writeln!(out, "no checkpoints");
    }
    let widest = rows.iter().map(|row| row.disk.len()).max().unwrap_or(0).max(4);
    writeln!(
        out,
        "{:<18} {:<widest$} {:<10} {:<12} {:>12} {:>12} {:>12}",
        "CHECKPOINT", "DISK", "DEVICE", "CLASS", "SIZE", "CHANGED", "STORED"
    )?;
    for row in rows {
        writeln!(
            out,
            "{:<18} {:<widest$} {:<10} {:<12} {:>12} {:>12} {:>12}",
            row.checkpoint,
            row.disk,
            row.device,
            row.consistency,
            HumanBytes(row.size_bytes).to_string(),
            HumanBytes(row.delta_bytes).to_string(),
            HumanBytes(row.stored_bytes).to_string()
        )?;
        if !row.note.is_empty() {
            writeln!(out, "    {}", row.note)?;
        }
    }
    Ok(())
}

/// Restores a checkpoint.
pub(crate) fn restore(args: super::Restore) -> anyhow::Result<()> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {percent:>3} %  {binary_bytes_per_sec}  {eta} left")
    {
        bar.set_style(style);
    }
    let options = RestoreOptions {
        data_dir: args.data_dir,
        agent: args.agent,
        disk: args.disk,
        checkpoint: args.checkpoint,
        output: args.output,
    };
    let report = restore_checkpoint(&options, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    let checkpoint = report.checkpoint;
    println!(
        "{}: checkpoint {} of {}'s {} ({}), {} verified",
        report.output.display(),
        checkpoint.id,
        checkpoint.agent,
        checkpoint.disk,
        checkpoint.consistency,
        HumanBytes(checkpoint.geometry.size_bytes())
    );
    if checkpoint.consistency == blxrep::checkpoint::Consistency::Fuzzy {
        eprintln!(
            "warning: this checkpoint is fuzzy: blocks are from slightly different moments; check its file systems"
        );
    }
    if !checkpoint.note.is_empty() {
        eprintln!("note: {}", checkpoint.note);
    }
    Ok(())
}
