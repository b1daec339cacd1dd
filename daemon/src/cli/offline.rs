//! `blxrep dispatcher show`, `restore` and `verify`: only a data directory is needed.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use blxrep::checkpoint::select::parse_minute;
use blxrep::restore::{
    DiskReport, DiskSummary, Output, RestoreError, RestoreOptions, RestoreReport, ShowRow, Verification,
    VerifyRequest, Wanted, check_empty, restore as restore_checkpoint, show as show_rows,
};
use blxrep::store::Damage;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::signals::on_signal;

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
    print(if args.json { json } else { table }, &rows)
}

fn json<T: Serialize + ?Sized>(out: &mut dyn Write, value: &T) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

fn print<T: ?Sized>(how: fn(&mut dyn Write, &T) -> std::io::Result<()>, value: &T) -> anyhow::Result<()> {
    match how(&mut std::io::stdout().lock(), value) {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

fn table(out: &mut dyn Write, rows: &[ShowRow]) -> std::io::Result<()> {
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
        if row.unreadable_blocks > 0 {
            writeln!(out, "    zeros for {} blocks that could not be read", row.unreadable_blocks)?;
        }
        if !row.note.is_empty() {
            writeln!(out, "    {}", row.note)?;
        }
    }
    Ok(())
}

/// What a person must know of a checkpoint that is right in all that could be read.
fn warn_unreadable(blocks: u32, sectors: &str) {
    if blocks > 0 {
        eprintln!(
            "warning: {blocks} blocks could not be read on the agent's disk and are zeros here: sectors {sectors}"
        );
    }
}

/// Runs something with a progress bar; a signal cancels it, so that it can clean up.
pub(super) fn with_progress<T, E: std::error::Error + Send + Sync + 'static>(
    work: impl FnOnce(&dyn Fn(u64, u64) -> ControlFlow<()>) -> Result<T, E>,
) -> anyhow::Result<T> {
    let canceled = Arc::new(AtomicBool::new(false));
    let seen = canceled.clone();
    on_signal(move || seen.store(true, Ordering::Relaxed))?;
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {percent:>3} %  {binary_bytes_per_sec}  {eta} left")
    {
        bar.set_style(style);
    }
    let result = work(&|done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if canceled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    Ok(result?)
}

/// One damaged file, as it is shown.
#[derive(Serialize)]
struct DamageRow {
    file: String,
    what: String,
    /// First block and number of blocks; empty where that cannot be told or all are affected.
    blocks: Vec<(u64, u64)>,
}

/// What a verify found, as it is shown.
#[derive(Serialize)]
struct VerifyRow {
    damage: Vec<DamageRow>,
    verified: Vec<DiskSummary>,
    #[serde(flatten)]
    only: Option<OnlyRow>,
}

/// What is told besides if only one checkpoint was verified.
#[derive(Serialize)]
struct OnlyRow {
    agent: String,
    disk: String,
    checkpoint: String,
    unreadable_blocks: u32,
    unreadable_sectors: String,
}

fn only(reports: &[DiskReport]) -> Option<OnlyRow> {
    let [DiskReport { owner, verified, .. }] = reports else { return None };
    let [one] = &**verified else { return None };
    Some(OnlyRow {
        agent: owner.agent.to_string(),
        disk: owner.disk.to_string(),
        checkpoint: one.id.to_string(),
        unreadable_blocks: one.unreadable_blocks,
        unreadable_sectors: one.unreadable_sectors.clone(),
    })
}

/// Verifies checkpoints.
pub(crate) fn verify(args: super::Verify) -> anyhow::Result<()> {
    let (start, end) = (minute(args.start.as_deref(), "start")?, minute(args.end.as_deref(), "end")?);
    let wanted =
        if args.checkpoint.is_empty() { Wanted::Between(start, end) } else { Wanted::Named(args.checkpoint) };
    let request = VerifyRequest { agent: args.agent, disk: args.disk, wanted };
    let verification = Verification::plan(&args.data_dir, &request)?;
    let reports = with_progress(|progress| verification.run(progress))?;
    let row = |damage: &Damage| DamageRow {
        file: damage.file.clone(),
        what: damage.what.clone(),
        blocks: damage.blocks.iter().map(|extent| (extent.first, extent.count)).collect(),
    };
    let shown = VerifyRow {
        damage: reports.iter().flat_map(DiskReport::damage).map(row).collect(),
        verified: reports.iter().map(DiskReport::summary).collect(),
        only: only(&reports),
    };
    print(if args.json { json } else { verdict }, &shown)?;
    let damage: Vec<Damage> = reports.iter().flat_map(DiskReport::damage).cloned().collect();
    if !damage.is_empty() {
        return Err(RestoreError::Damaged(damage).into());
    }
    if let Some(only) = &shown.only {
        warn_unreadable(only.unreadable_blocks, &only.unreadable_sectors);
    }
    Ok(())
}

/// One line of one checkpoint that is sound; of several, one of each disk.
fn verdict(out: &mut dyn Write, shown: &VerifyRow) -> std::io::Result<()> {
    if let Some(OnlyRow { agent, disk, checkpoint, .. }) = &shown.only {
        let sound = shown.damage.is_empty();
        return if sound {
            writeln!(out, "checkpoint {checkpoint} of {agent}'s {disk} is sound")
        } else {
            Ok(())
        };
    }
    for row in &shown.verified {
        let DiskSummary { agent, disk, oldest, newest, checkpoints, damaged, .. } = row;
        write!(out, "{agent} {disk}: {checkpoints} checkpoints, {oldest} to {newest}: ")?;
        match &row.first_damaged {
            None => writeln!(out, "sound")?,
            Some(first) => writeln!(out, "{damaged} damaged, from {first} on")?,
        }
        if row.unreadable > 0 {
            writeln!(out, "    zeros for blocks that could not be read in {} of them", row.unreadable)?;
        }
    }
    Ok(())
}

/// Restores a checkpoint.
pub(crate) fn restore(args: super::Restore) -> anyhow::Result<()> {
    let output = args.output.map(Output::Path);
    if let Some(output) = &output {
        check_empty(output, args.overwrite.as_deref())?;
    }
    let options = RestoreOptions {
        data_dir: args.data_dir,
        agent: args.agent,
        disk: args.disk,
        checkpoint: args.checkpoint,
        partition: args.partition,
        output,
    };
    tell_restored(&with_progress(|progress| restore_checkpoint(options, progress))?);
    Ok(())
}

/// Says what was restored, and what a person must know of it.
pub(super) fn tell_restored(report: &RestoreReport) {
    let checkpoint = &report.checkpoint;
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
    warn_unreadable(checkpoint.unreadable_blocks, &report.unreadable_sectors);
    if !checkpoint.note.is_empty() {
        eprintln!("note: {}", checkpoint.note);
    }
}
