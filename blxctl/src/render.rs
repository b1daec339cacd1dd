//! Text for people: tables, sizes, ages. Pure.

use comfy_table::{CellAlignment, Table};
use indicatif::HumanBytes;

use crate::model::{Agent, Checkpoint, Disk, Job, Scrub, Verified};

/// A heading and on which side its column is aligned.
type Heading = (&'static str, CellAlignment);

const LEFT: CellAlignment = CellAlignment::Left;
const RIGHT: CellAlignment = CellAlignment::Right;

/// Plain columns, two spaces apart.
fn table(headings: &[Heading], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(headings.iter().map(|(name, _)| *name));
    table.add_rows(rows);
    for (column, (_, alignment)) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        column.set_cell_alignment(*alignment);
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `-` for what is empty.
fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// `all` where none is named.
fn or_all(text: &str) -> String {
    if text.is_empty() { "all".to_owned() } else { text.to_owned() }
}

pub(crate) fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", (share * 100.0).floor())
}

/// A time span, in its largest unit.
pub(crate) fn span(usec: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("d", 86_400), ("h", 3_600), ("min", 60)];
    let seconds = usec / 1_000_000;
    // Two of a unit at least, so that no figure is rounded by half.
    let unit =
        UNITS.into_iter().find(|(name, length)| seconds >= length * if *name == "min" { 1 } else { 2 });
    match unit {
        Some((name, length)) => format!("{} {name}", seconds / length),
        None => format!("{seconds} s"),
    }
}

pub(crate) fn age(usec: u64) -> String {
    format!("{} ago", span(usec))
}

/// What a disk is doing, and how far it is.
fn doing(disk: &Disk) -> String {
    if disk.progress > 0.0 {
        format!("{} {}", disk.state, percent(disk.progress))
    } else {
        disk.state.clone()
    }
}

/// Disks as `status` shows them: how old and how much.
pub(crate) fn exposure(disks: &[&Disk]) -> String {
    let headings = [
        ("AGENT", LEFT),
        ("DISK", LEFT),
        ("STATE", LEFT),
        ("NEWEST", RIGHT),
        ("EXPOSED", RIGHT),
        ("CLASS", LEFT),
    ];
    let row = |disk: &&Disk| {
        vec![
            disk.agent.clone(),
            disk.name().to_owned(),
            doing(disk),
            disk.lag_usec.map_or_else(|| "none".to_owned(), age),
            bytes(disk.dirty_bytes),
            or_dash(&disk.consistency),
        ]
    };
    table(&headings, disks.iter().map(row).collect())
}

/// Disks as `disks` shows them.
pub(crate) fn disks(disks: &[&Disk]) -> String {
    if disks.is_empty() {
        return "no disks\n".to_owned();
    }
    let headings = [
        ("AGENT", LEFT),
        ("DEVICE", LEFT),
        ("DISK", LEFT),
        ("SIZE", RIGHT),
        ("STATE", LEFT),
        ("CHECKPOINT", LEFT),
        ("CLASS", LEFT),
    ];
    let row = |disk: &&Disk| {
        vec![
            disk.agent.clone(),
            or_dash(&disk.device),
            disk.id.clone(),
            bytes(disk.size_bytes),
            doing(disk),
            or_dash(&disk.last_checkpoint),
            or_dash(&disk.consistency),
        ]
    };
    table(&headings, disks.iter().map(row).collect())
}

/// Each followed by why a machine of its name is refused. `now_usec`: microseconds since 1970.
pub(crate) fn agents(agents: &[Agent], now_usec: u64) -> String {
    if agents.is_empty() {
        return "no agents\n".to_owned();
    }
    let headings = [
        ("AGENT", LEFT),
        ("CONNECTED", LEFT),
        ("HOST", LEFT),
        ("ADDRESS", LEFT),
        ("VERSION", LEFT),
        ("SEEN", RIGHT),
        ("DISKS", RIGHT),
    ];
    let row = |agent: &Agent| {
        vec![
            agent.id.clone(),
            if agent.connected { "yes" } else { "no" }.to_owned(),
            or_dash(&agent.hostname),
            or_dash(&agent.address),
            or_dash(&agent.version),
            match agent.last_seen_usec {
                0 => "never".to_owned(),
                seen => age(now_usec.saturating_sub(seen)),
            },
            agent.disks.to_string(),
        ]
    };
    with_notes(
        &table(&headings, agents.iter().map(row).collect()),
        agents.iter().map(|agent| agent.refused.clone()),
    )
}

/// A table's rows, each followed by its note if it has one.
fn with_notes(table: &str, notes: impl Iterator<Item = String>) -> String {
    let with_note = |(line, note): (&str, String)| match &*note {
        "" => format!("{line}\n"),
        note => format!("{line}\n    {note}\n"),
    };
    table.lines().zip(std::iter::once(String::new()).chain(notes)).map(with_note).collect()
}

/// Checkpoints, each followed by what it lacks, whether it boots, and its note.
pub(crate) fn checkpoints(checkpoints: &[Checkpoint], now_usec: u64) -> String {
    if checkpoints.is_empty() {
        return "no checkpoints\n".to_owned();
    }
    let headings = [
        ("CHECKPOINT", LEFT),
        ("AGE", RIGHT),
        ("DEVICE", LEFT),
        ("DISK", LEFT),
        ("CLASS", LEFT),
        ("CHANGED", RIGHT),
        ("STORED", RIGHT),
    ];
    let row = |checkpoint: &Checkpoint| {
        let time: Option<jiff::Timestamp> = checkpoint.time.parse().ok();
        let usec = time.and_then(|time| u64::try_from(time.as_microsecond()).ok());
        vec![
            checkpoint.checkpoint.clone(),
            usec.map_or_else(|| "-".to_owned(), |usec| span(now_usec.saturating_sub(usec))),
            or_dash(&checkpoint.device),
            checkpoint.disk.clone(),
            checkpoint.consistency.clone(),
            bytes(checkpoint.delta_bytes),
            bytes(checkpoint.stored_bytes),
        ]
    };
    let said = |c: &Checkpoint| {
        let lacks = (c.unreadable_blocks > 0)
            .then(|| format!("zeros for {} blocks that could not be read", c.unreadable_blocks));
        let boots = match &*c.boot {
            "" => None,
            "passed" => Some(format!("boots, as seen {}", c.boot_time)),
            _ => Some(format!("does not boot, as seen {}", c.boot_time)),
        };
        let note = (!c.note.is_empty()).then(|| c.note.clone());
        lacks.into_iter().chain(boots).chain(note).collect::<Vec<_>>().join("\n    ")
    };
    with_notes(&table(&headings, checkpoints.iter().map(row).collect()), checkpoints.iter().map(said))
}

/// What a verify of several checkpoints found, by disk.
pub(crate) fn verified(disks: &[Verified]) -> String {
    let headings = [
        ("AGENT", LEFT),
        ("DISK", LEFT),
        ("CHECKPOINTS", RIGHT),
        ("OLDEST", LEFT),
        ("NEWEST", LEFT),
        ("DAMAGED", LEFT),
    ];
    let row = |disk: &Verified| {
        vec![
            disk.agent.clone(),
            disk.disk.clone(),
            disk.checkpoints.to_string(),
            disk.oldest.clone(),
            disk.newest.clone(),
            match &*disk.first_damaged {
                "" => "none".to_owned(),
                first => format!("{}, from {first} on", disk.damaged),
            },
        ]
    };
    let lacks = |disk: &Verified| match disk.unreadable {
        0 => String::new(),
        n => format!("{n} of them have zeros for blocks that could not be read"),
    };
    with_notes(&table(&headings, disks.iter().map(row).collect()), disks.iter().map(lacks))
}

/// How the check of everything stored is doing, in one line.
pub(crate) fn scrub(scrub: &Scrub) -> String {
    let mut parts = Vec::new();
    if scrub.every_usec == 0 {
        parts.push("switched off".to_owned());
    } else if scrub.began_usec > 0 {
        parts.push(percent(scrub.progress));
    }
    parts.push(match scrub.last_ended_usec {
        0 => "no full pass yet".to_owned(),
        ended => format!("last full pass {}", date(ended)),
    });
    parts.push(match scrub.damaged {
        0 => "no damage".to_owned(),
        1 => "damage in the files of 1 checkpoint".to_owned(),
        n => format!("damage in the files of {n} checkpoints"),
    });
    format!("scrub: {}", parts.join(", "))
}

/// The day, in UTC, of microseconds since 1970.
fn date(usec: u64) -> String {
    let time = i64::try_from(usec).ok().and_then(|usec| jiff::Timestamp::from_microsecond(usec).ok());
    time.map_or_else(|| "-".to_owned(), |time| time.strftime("%Y-%m-%d").to_string())
}

pub(crate) fn jobs(jobs: &[Job]) -> String {
    if jobs.is_empty() {
        return "no jobs run\n".to_owned();
    }
    let headings = [
        ("JOB", RIGHT),
        ("TYPE", LEFT),
        ("AGENT", LEFT),
        ("DISK", LEFT),
        ("CHECKPOINT", LEFT),
        ("DONE", RIGHT),
        ("RATE", RIGHT),
        ("BY", LEFT),
    ];
    let row = |job: &Job| {
        vec![
            job.id.to_string(),
            job.job_type.clone(),
            or_all(&job.agent),
            or_all(&job.disk),
            or_dash(&job.checkpoint),
            if job.state == "canceling" { job.state.clone() } else { percent(job.progress) },
            format!("{}/s", bytes(job.rate_bytes)),
            job.started_by.clone().unwrap_or_else(|| job.started_by_uid.to_string()),
        ]
    };
    table(&headings, jobs.iter().map(row).collect())
}

/// A job in one line.
pub(crate) fn job_line(job: &Job) -> String {
    let mut line = format!("job {}: {} of {}", job.id, job.job_type, or_all(&job.agent));
    if !job.disk.is_empty() {
        line.push_str(&format!(" {}", job.disk));
    }
    if !job.target.is_empty() {
        line.push_str(&format!(" to {}", job.target));
    }
    let amount = amount(job.bytes_done, job.bytes_total, job.rate_bytes);
    line.push_str(&format!(", {}", percent(job.progress)));
    if !amount.is_empty() {
        line.push_str(&format!(", {amount}"));
    }
    line
}

/// How much is done, how fast it goes and how long it will take; empty while nothing of that is known.
pub(crate) fn amount(done: u64, total: u64, rate: u64) -> String {
    let mut parts = Vec::new();
    if total > 0 {
        parts.push(format!("{} of {}", bytes(done), bytes(total)));
    }
    if rate > 0 {
        parts.push(format!("{}/s", bytes(rate)));
        let left = total.saturating_sub(done);
        if left > 0 {
            parts.push(format!("{} left", span((left / rate).saturating_mul(1_000_000))));
        }
    }
    parts.join(", ")
}

/// What was accepted.
pub(crate) fn accepted(agent: &str, disk: Option<&str>) -> String {
    match disk {
        None => format!(
            "{agent}: accepted; the machine that was refused goes on when it asks next, within 75 s\n"
        ),
        Some(disk) => format!("{agent} {disk}: accepted\n"),
    }
}

/// What pause or resume changed.
pub(crate) fn paused(changed: &[&Disk], paused: bool) -> String {
    if changed.is_empty() {
        return if paused { "was paused already\n" } else { "was not paused\n" }.to_owned();
    }
    let line = |disk: &&Disk| {
        let state = match (paused, disk.paused) {
            (true, _) => "paused".to_owned(),
            (false, false) => "resumed".to_owned(),
            (false, true) => format!("resumed, but still paused by the {}", disk.paused_by.join(" and the ")),
        };
        format!("{} {}: {state}\n", disk.agent, disk.name())
    };
    changed.iter().map(line).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use insta::assert_snapshot;

    use super::*;

    const NOW: u64 = 1_795_293_600_000_000;

    pub(crate) fn disk(agent: &str, device: &str) -> Disk {
        Disk {
            agent: agent.to_owned(),
            id: format!("5000c500a1b2c3{device}"),
            device: device.to_owned(),
            size_bytes: 500 << 30,
            state: "idle".to_owned(),
            dirty_bytes: 12 << 20,
            last_checkpoint: "20261121203456".to_owned(),
            lag_usec: Some(200_000_000),
            consistency: "filesystem".to_owned(),
            sync_every_usec: 300_000_000,
            ..Disk::default()
        }
    }

    pub(crate) fn job() -> Job {
        Job {
            id: 7,
            job_type: "restore".to_owned(),
            agent: "web1".to_owned(),
            disk: "sda".to_owned(),
            checkpoint: "20261121203456".to_owned(),
            target: "/srv/x.img".to_owned(),
            started_by: Some("root".to_owned()),
            state: "running".to_owned(),
            progress: 0.439,
            bytes_done: 440 << 20,
            bytes_total: 1 << 30,
            rate_bytes: 100 << 20,
            ..Job::default()
        }
    }

    #[test]
    fn a_scrub_in_one_line() {
        let scrub_of = |began_usec, last_ended_usec, damaged| Scrub {
            every_usec: 1,
            progress: 0.439,
            began_usec,
            last_ended_usec,
            damaged,
            ..Scrub::default()
        };
        assert_eq!(scrub(&scrub_of(1, NOW, 0)), "scrub: 43 %, last full pass 2026-11-21, no damage");
        assert_eq!(scrub(&scrub_of(1, 0, 0)), "scrub: 43 %, no full pass yet, no damage");
        let damaged = scrub(&scrub_of(0, NOW, 2));
        assert_eq!(damaged, "scrub: last full pass 2026-11-21, damage in the files of 2 checkpoints");
        let off = Scrub { every_usec: 0, ..scrub_of(0, 0, 1) };
        assert_eq!(scrub(&off), "scrub: switched off, no full pass yet, damage in the files of 1 checkpoint");
    }

    #[test]
    fn spans_are_in_their_largest_unit() {
        let text = |seconds: u64| span(seconds * 1_000_000);
        assert_eq!([0, 59, 60, 7_199].map(text), ["0 s", "59 s", "1 min", "119 min"]);
        assert_eq!([7_200, 172_799, 172_800].map(text), ["2 h", "47 h", "2 d"]);
        assert_eq!(span(u64::MAX), "213503982 d");
    }

    #[test]
    fn a_share_never_reads_as_done_before_it_is() {
        assert_eq!((percent(0.999).as_str(), percent(1.0).as_str()), ("99 %", "100 %"));
    }

    #[test]
    fn disks_in_a_table() {
        let copying = Disk {
            state: "copying".into(),
            progress: 0.4,
            last_checkpoint: String::new(),
            lag_usec: None,
            consistency: String::new(),
            ..disk("db-2", "vda")
        };
        assert_snapshot!(disks(&[&disk("web1", "sda"), &copying]), @r"
        AGENT  DEVICE  DISK                     SIZE  STATE         CHECKPOINT      CLASS
        web1   sda     5000c500a1b2c3sda  500.00 GiB  idle          20261121203456  filesystem
        db-2   vda     5000c500a1b2c3vda  500.00 GiB  copying 40 %  -               -
        ");
        assert_snapshot!(exposure(&[&disk("web1", "sda"), &copying]), @r"
        AGENT  DISK  STATE            NEWEST    EXPOSED  CLASS
        web1   sda   idle          3 min ago  12.00 MiB  filesystem
        db-2   vda   copying 40 %       none  12.00 MiB  -
        ");
        assert_snapshot!(disks(&[]), @"no disks");
    }

    #[test]
    fn agents_in_a_table() {
        let web = Agent {
            id: "web1".into(),
            connected: true,
            hostname: "web1.example".into(),
            version: "0.1.0".into(),
            address: "192.0.2.7:40112".into(),
            last_seen_usec: NOW - 4_000_000,
            disks: 2,
            ..Agent::default()
        };
        let never = Agent { id: "db1".into(), ..Agent::default() };
        let refused = Agent {
            id: "db2".into(),
            refused: "the machine at 192.0.2.9 is refused: why".into(),
            ..Agent::default()
        };
        assert_snapshot!(agents(&[web, refused, never], NOW), @r"
        AGENT  CONNECTED  HOST          ADDRESS          VERSION     SEEN  DISKS
        web1   yes        web1.example  192.0.2.7:40112  0.1.0    4 s ago      2
        db2    no         -             -                -          never      0
            the machine at 192.0.2.9 is refused: why
        db1    no         -             -                -          never      0
        ");
        assert_snapshot!(agents(&[], NOW), @"no agents");
    }

    #[test]
    fn checkpoints_in_a_table_with_their_notes() {
        let base = Checkpoint {
            checkpoint: "20261121203456".into(),
            agent: "web1".into(),
            disk: "5000c500a1b2c3d4".into(),
            device: "sda".into(),
            time: "2026-11-21T20:34:56Z".into(),
            consistency: "filesystem".into(),
            size_bytes: 1 << 30,
            delta_bytes: 1 << 30,
            stored_bytes: 300 << 20,
            freeze_ms: 40,
            boot: "passed".into(),
            boot_time: "2026-11-22T04:00:00Z".into(),
            ..Checkpoint::default()
        };
        let fuzzy = Checkpoint {
            checkpoint: "20261121203956-2".into(),
            consistency: "fuzzy".into(),
            delta_bytes: 4 << 20,
            stored_bytes: 1 << 20,
            unreadable_blocks: 8,
            note: "/srv could not be frozen".into(),
            time: "unclear".into(),
            boot: "failed".into(),
            ..base.clone()
        };
        assert_snapshot!(checkpoints(&[base, fuzzy], NOW), @r"
        CHECKPOINT          AGE  DEVICE  DISK              CLASS        CHANGED      STORED
        20261121203456    5 min  sda     5000c500a1b2c3d4  filesystem  1.00 GiB  300.00 MiB
            boots, as seen 2026-11-22T04:00:00Z
        20261121203956-2      -  sda     5000c500a1b2c3d4  fuzzy       4.00 MiB    1.00 MiB
            zeros for 8 blocks that could not be read
            does not boot, as seen 2026-11-22T04:00:00Z
            /srv could not be frozen
        ");
        assert_snapshot!(checkpoints(&[], NOW), @"no checkpoints");
    }

    #[test]
    fn jobs_in_a_table_and_in_a_line() {
        let sync = Job {
            id: 12,
            job_type: "sync".into(),
            agent: "web1".into(),
            state: "canceling".into(),
            started_by_uid: 4711,
            ..Job::default()
        };
        assert_snapshot!(jobs(&[job(), sync.clone()]), @r"
        JOB  TYPE     AGENT  DISK  CHECKPOINT           DONE          RATE  BY
          7  restore  web1   sda   20261121203456       43 %  100.00 MiB/s  root
         12  sync     web1   all   -               canceling         0 B/s  4711
        ");
        assert_snapshot!(jobs(&[]), @"no jobs run");
        assert_snapshot!(job_line(&job()), @"job 7: restore of web1 sda to /srv/x.img, 43 %, 440.00 MiB of 1.00 GiB, 100.00 MiB/s, 5 s left");
        assert_snapshot!(job_line(&sync), @"job 12: sync of web1, 0 %");
    }

    #[test]
    fn what_was_paused_and_resumed() {
        let one = disk("web1", "sda");
        let still = Disk { paused: true, paused_by: vec!["agent".into()], ..disk("web1", "sdb") };
        assert_snapshot!(paused(&[&one, &still], true), @r"
        web1 sda: paused
        web1 sdb: paused
        ");
        assert_snapshot!(paused(&[&one, &still], false), @r"
        web1 sda: resumed
        web1 sdb: resumed, but still paused by the agent
        ");
        assert_eq!(
            (paused(&[], true).as_str(), paused(&[], false).as_str()),
            ("was paused already\n", "was not paused\n")
        );
    }

    #[test]
    fn the_amount_says_only_what_is_known() {
        assert_eq!(amount(0, 0, 0), "");
        assert_eq!(amount(5, 0, 1024), "1.00 KiB/s");
        assert_eq!(amount(1 << 20, 1 << 20, 1024), "1.00 MiB of 1.00 MiB, 1.00 KiB/s");
    }
}
