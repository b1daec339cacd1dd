//! A running dispatcher finds damage in what it stores by itself, tells it, and keeps it over a restart until it is put right.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends so"
)]

mod common {
    pub(crate) mod bus;
    pub(crate) mod lab;
}

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use common::bus::Bus;
use common::lab::{BLXREP, Lab, run, wait_for};
use tokio::runtime::Runtime;

/// A pass as often as it may be.
const EAGER: [&str; 6] = ["--sync-freq", "1s", "--scrub-every", "1s", "--scrub-rate-mib", "1000"];

/// What the dispatcher says on the bus: when the last pass ended (microseconds since 1970), and what is damaged.
fn says(bus: &Bus, runtime: &Runtime, agent: &str, disk: &str) -> (u64, u32, Vec<String>) {
    runtime.block_on(async {
        let scrub = bus.dispatcher().await.scrub().await.unwrap();
        let damage = bus.disk(agent, disk).await.damage().await.unwrap();
        let ended = scrub["last_ended_usec"].downcast_ref::<u64>().unwrap();
        (ended, scrub["damaged"].downcast_ref::<u32>().unwrap(), damage)
    })
}

fn flip(path: &PathBuf, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn damage_is_found_told_and_kept_until_it_is_put_right() {
    let mut lab = Lab::new("scrub");
    let bus = Bus::start(&lab);
    lab.bus = Some(bus.address.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (agent, disk) = (lab.agent("a"), lab.loop_disk(16));
    let of = format!("of={}", disk.path);
    let fill = |mib: &str| {
        let count = format!("count={mib}");
        run("dd", &["if=/dev/urandom", &of, "bs=1M", &count, "oflag=direct", "status=none"]);
    };
    fill("6");
    lab.enroll(&agent);
    lab.start_dispatcher(&EAGER);
    let process = lab.start_agent(&agent, &[&disk.path], &[]);
    let rows = lab.wait_checkpoints(&agent, &disk.name, 1, 60);
    let id = rows[0]["disk"].as_str().unwrap().to_owned();
    fill("1");
    let large = |row: &serde_json::Value| row["delta_bytes"].as_u64().unwrap() >= 1 << 20;
    wait_for("that in a checkpoint", 60, || lab.show(&agent, None).iter().skip(1).any(large));
    let rows = lab.show(&agent, None);
    let delta = rows.iter().skip(1).find(|row| large(row)).unwrap()["checkpoint"].as_str().unwrap();
    lab.wait_checkpoints(&agent, &disk.name, rows.len() + 1, 60);
    drop(process);

    // Passes under running commits were sound, and so is one of all there is now.
    let ask = |bus: &Bus| says(bus, &runtime, &agent, &id);
    let (before, ..) = ask(&bus);
    wait_for("two passes", 60, || ask(&bus).0 > before);
    let between = ask(&bus).0;
    wait_for("a pass", 60, || ask(&bus).0 > between);
    assert_eq!((ask(&bus).1, ask(&bus).2), (0, vec![]));

    let path = PathBuf::from(lab.path(&format!("data/incremental/{agent}/{id}/{delta}.bak")));
    // Within the data: what only a whole look finds.
    flip(&path, 100_000);
    wait_for("the damage to be found", 60, || ask(&bus).1 > 0);
    let (_, damaged, lines) = ask(&bus);
    assert!(damaged == 1 && lines.len() == 1 && lines[0].contains(&format!("{delta}.bak")), "{lines:?}");
    let log = lab.dispatcher.as_ref().unwrap().log();
    let told: Vec<_> = log.lines().filter(|line| line.contains(&lines[0])).collect();
    assert!(told.iter().any(|line| line.contains("ERROR") && line.contains(delta)), "{told:?}");

    // Known at once after a kill, and told no second time.
    lab.dispatcher.as_mut().unwrap().kill();
    lab.start_dispatcher(&["--scrub-every", "30d"]);
    assert_eq!((ask(&bus).1, ask(&bus).2), (1, lines.clone()));
    let stop = Instant::now();
    lab.dispatcher.as_ref().unwrap().signal("TERM");
    assert_eq!(lab.dispatcher.as_mut().unwrap().exit_code(20), 0);
    assert!(stop.elapsed().as_secs() < 10, "{:?}", stop.elapsed());

    flip(&path, 100_000);
    lab.start_dispatcher(&EAGER);
    wait_for("the place to be found sound", 60, || ask(&bus).1 == 0);
    assert_eq!(ask(&bus).2, [""; 0]);
    let log = lab.dispatcher.as_ref().unwrap().log();
    assert_eq!(log.matches(&lines[0]).count(), told.len(), "once");
    assert!(log.contains("sound again"), "{log}");
    assert!(fs::metadata(lab.path("data/scrub")).unwrap().len() < 4096);

    // The same by hand, of everything at once, without a daemon.
    let data = lab.path("data");
    let verify = || {
        let args = ["dispatcher", "verify", "--all", "--json", "--data-dir", &data];
        let output = Command::new(BLXREP).args(args).output().unwrap();
        (output.status.code(), serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap())
    };
    let (code, found) = verify();
    assert_eq!((code, &found["verified"][0]["damaged"]), (Some(0), &0.into()));
    flip(&path, 100_000);
    let (code, found) = verify();
    assert_eq!((code, &found["verified"][0]["first_damaged"]), (Some(4), &delta.into()), "{found}");
    let resting =
        lab.show(&agent, None).iter().filter(|row| row["checkpoint"].as_str() >= Some(delta)).count();
    assert_eq!(found["verified"][0]["damaged"], resting, "all that rest on it");
}
