//! What an operator does: restores by busctl and blxctl on either host, syncs, verifies, looks; and what the bus signals meanwhile.

use std::fs;

use serde_json::Value;

use super::hosts::{Disk, Host, Pair};
use super::lab::{run, wait_for};

const MANAGER: &str = "org.blxrep.Dispatcher /org/blxrep/Manager org.blxrep.Manager";

/// One JSON document that a command printed.
fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn same_as_photo(pair: &Pair, restored: &str, disk: &str, id: &str) {
    let name = pair.shared.join(restored);
    run("cmp", &[name.to_str().unwrap(), pair.shared.join(format!("{disk}-{id}")).to_str().unwrap()]);
    fs::remove_file(name).unwrap();
}

/// The newest checkpoint of a disk with its photograph.
fn newest(pair: &Pair, host: &Host, disk: &str) -> String {
    let rows = json(&host.run(&format!("blxctl show web1 --disk {disk} --json")));
    let rows = rows.as_array().unwrap();
    let id = rows.last().unwrap()["checkpoint"].as_str().unwrap().to_owned();
    assert!(pair.shared.join(format!("{disk}-{id}")).exists(), "{id} has no photograph: {rows:?}");
    id
}

#[test]
fn checkpoints_come_back_by_every_way_a_person_may_take() {
    let pair = Pair::boot("bus");
    pair.configure();
    let (dispatcher, agent, disk) = (&pair.dispatcher, &pair.agent, &pair.root.name);
    assert_eq!(dispatcher.try_run("blxctl status").status.code(), Some(3), "nothing runs yet");
    pair.write();
    pair.start();
    // Activation is over when the name is taken.
    for host in [dispatcher, agent] {
        let role = if host.is("systemctl is-active -q blxrep-agent") { "Agent" } else { "Dispatcher" };
        let seen = host.run(&format!("busctl introspect org.blxrep.{role} /org/blxrep/Manager"));
        for line in [".Restore", "sssa{sv}", ".JobRemoved", ".CheckpointAdded"] {
            assert!(seen.contains(line), "{line}: {seen}");
        }
    }
    for disk in pair.disks() {
        pair.more_checkpoints(disk, 3, 180);
    }

    // A monitor of everything, in the background.
    dispatcher
        .background("monitor", "exec busctl monitor --json=short org.blxrep.Dispatcher >/shared/monitor");
    wait_for("the monitor", 10, || fs::metadata(pair.shared.join("monitor")).is_ok());
    let id = newest(&pair, dispatcher, disk);
    let target = "/var/lib/blxrep-dispatcher/back.img";
    let call = format!("busctl call {MANAGER} Restore 'sssa{{sv}}' web1 {id} {target} 1 disk s {disk}");
    let job = dispatcher.run(&call);
    let job = job.strip_prefix("o \"").and_then(|job| job.strip_suffix('"')).expect("a job").to_owned();
    assert_eq!(job, "/org/blxrep/job/1");
    let state = dispatcher
        .run(&format!("busctl get-property org.blxrep.Dispatcher {job} org.blxrep.Job Type Target"));
    assert_eq!(state, format!("s \"restore\"\ns \"{target}\""));
    wait_for("the job to end", 120, || {
        !dispatcher.is(&format!("busctl introspect org.blxrep.Dispatcher {job} org.blxrep.Job"))
    });
    wait_for("the file", 10, || dispatcher.is(&format!("[ -e {target} ]")));
    dispatcher.run(&format!("mv {target} /shared/busctl.img"));
    same_as_photo(&pair, "busctl.img", disk, &id);
    signals_are_few(&pair, &job);

    // By blxctl, as root opens the target, on the dispatcher and on the agent.
    for (host, file) in [(dispatcher, "dispatcher.img"), (agent, "agent.img")] {
        let id = newest(&pair, host, &pair.data.name);
        let restore =
            format!("blxctl restore --agent web1 --disk {} {id} /shared/{file} --json", pair.data.name);
        let ended = json(&host.run(&restore));
        assert_eq!(
            (&ended["result"], &ended["checkpoint"]),
            (&"done".into(), &id.as_str().into()),
            "{ended}"
        );
        same_as_photo(&pair, file, &pair.data.name, &id);
        let again = host
            .try_run(&format!("touch /shared/x; blxctl restore --agent web1 --disk {disk} latest /shared/x"));
        assert_eq!(
            again.status.code(),
            Some(2),
            "an existing file: {}",
            String::from_utf8_lossy(&again.stderr)
        );
    }
    onto_a_device(&pair);
    watched_and_canceled(&pair);
    asked_now(&pair);
    damage_is_found(&pair);
}

/// A job that is canceled leaves nothing; who watches hears of it.
fn watched_and_canceled(pair: &Pair) {
    let (dispatcher, disk) = (&pair.dispatcher, &pair.root.name);
    dispatcher.background("watch", "exec blxctl watch >/shared/watch 2>&1");
    let watch = pair.shared.join("watch");
    let heard = |what: &str| fs::read_to_string(&watch).is_ok_and(|text| text.contains(what));
    wait_for("a checkpoint to be watched", 30, || heard(": checkpoint 2"));
    let restore = format!(
        "blxctl restore --agent web1 --disk {disk} latest /var/lib/blxrep-dispatcher/never.img --no-wait --json"
    );
    let job = json(&dispatcher.run(&restore))["job"].as_u64().unwrap();
    dispatcher.run(&format!("blxctl cancel {job}"));
    wait_for("the cancel to be watched", 10, || heard(&format!("job {job} ended: canceled")));
    assert_eq!(dispatcher.run("blxctl jobs --json"), "[]");
    assert_eq!(dispatcher.run("ls -A /var/lib/blxrep-dispatcher | grep never || true"), "");
    dispatcher.run("systemctl stop watch");
}

/// A device that the caller opens, under the dispatcher's sandbox; the daemon by itself may not.
fn onto_a_device(pair: &Pair) {
    let (dispatcher, disk) = (&pair.dispatcher, &pair.data.name);
    let spare = Disk::new(&pair.shared.join("spare"), 320);
    dispatcher.node(&spare);
    let id = newest(pair, dispatcher, disk);
    let call =
        format!("busctl call {MANAGER} Restore 'sssa{{sv}}' web1 {id} {} 1 disk s {disk} 2>&1", spare.path);
    let refused = dispatcher.run(&format!("{call} || true"));
    assert!(refused.contains("blxctl restore"), "{refused}");
    let restore = format!("blxctl restore --agent web1 --disk {disk} {id} {}", spare.path);
    dispatcher.run(&restore);
    let photo = pair.shared.join(format!("{disk}-{id}"));
    run("cmp", &[&spare.path, photo.to_str().unwrap()]);
    // What it holds now is seen from within the sandbox as well.
    let again = dispatcher.try_run(&restore);
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.code() == Some(2) && said.contains("holds "), "{said}");
    dispatcher.run(&format!("{restore} --overwrite {}", spare.path));
    run("cmp", &[&spare.path, photo.to_str().unwrap()]);
    let store = format!(
        "busctl call {MANAGER} Restore 'sssa{{sv}}' web1 {id} /var/lib/blxrep-dispatcher/paused 1 disk s {disk} 2>&1"
    );
    assert!(dispatcher.run(&format!("{store} || true")).contains("*.img"), "into the store");
    fs::remove_file(pair.shared.join("spare")).unwrap();
}

/// Property changes of a job come at most twice a second, and its end is told with details.
fn signals_are_few(pair: &Pair, job: &str) {
    let text = fs::read_to_string(pair.shared.join("monitor")).unwrap();
    let all: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let member = |name: &str| all.iter().filter(move |message| message["member"] == name).collect::<Vec<_>>();
    assert_eq!(member("JobNew").len(), 1);
    let ended = member("JobRemoved");
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!(ended[0]["payload"]["data"][1], job);
    assert_eq!(ended[0]["payload"]["data"][2], "done", "{}", ended[0]);
    let changes: Vec<&Value> =
        member("PropertiesChanged").into_iter().filter(|message| message["path"] == job).collect();
    let times: Vec<u64> = changes.iter().map(|m| m["timestamp-realtime"].as_u64().unwrap()).collect();
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 450_000), "{times:?}");
    let taken_usec = ended[0]["timestamp-realtime"].as_u64().unwrap()
        - member("JobNew")[0]["timestamp-realtime"].as_u64().unwrap();
    assert!(taken_usec < 1_500_000 || times.len() >= 2, "{} signals in {taken_usec} us", times.len());
    eprintln!("{} signals of progress in {} ms", times.len(), taken_usec / 1000);
}

/// A sync now, a look, a verify.
fn asked_now(pair: &Pair) {
    let (dispatcher, agent) = (&pair.dispatcher, &pair.agent);
    let before = pair.checkpoints(&pair.root).len();
    let ended = json(&dispatcher.run(&format!("blxctl sync web1 --disk {} --json", pair.root.name)));
    assert_eq!(ended["result"], "done", "{ended}");
    assert!(pair.checkpoints(&pair.root).len() > before);
    assert_eq!(json(&agent.run("blxctl sync --json"))["result"], "done");
    for host in [dispatcher, agent] {
        let status = host.try_run("blxctl status --json");
        let status = json(&String::from_utf8_lossy(&status.stdout));
        assert_eq!(
            (&status["ok"], &status["daemons"][0]["disks_protected"]),
            (&true.into(), &2.into()),
            "{status}"
        );
        eprintln!("{}", host.run("blxctl status"));
    }
    assert_eq!(json(&dispatcher.run("blxctl agents --json"))[0]["connected"], true);
    dispatcher.run(&format!("blxctl verify --agent web1 --disk {} latest", pair.data.name));
    let other_role = agent.try_run(&format!("blxctl verify --disk {} latest", pair.data.name));
    assert!(!other_role.status.success(), "only a dispatcher verifies");
    let none = dispatcher.try_run("blxctl restore --agent web1 --disk nosuch latest /shared/none");
    assert_eq!(none.status.code(), Some(5), "{}", String::from_utf8_lossy(&none.stderr));
    assert!(!pair.shared.join("none").exists());
}

/// A flipped bit is found by verify and restore, told by its MESSAGE_ID, and nothing is left.
fn damage_is_found(pair: &Pair) {
    let dispatcher = &pair.dispatcher;
    // In the superblock of the ext4: never a hole.
    dispatcher.run(&format!(
        "dd if=/dev/urandom of=$(ls /var/lib/blxrep-dispatcher/snapshot/web1/{}/*.img) bs=16 seek=68 count=1 conv=notrunc status=none; sync",
        pair.root.name
    ));
    for command in
        ["verify --agent web1 --disk ROOT latest", "restore --agent web1 --disk ROOT latest /shared/bad.img"]
    {
        let output = dispatcher.try_run(&format!("blxctl {}", command.replace("ROOT", &pair.root.name)));
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(text.contains(".img"), "the file is named: {text}");
    }
    assert!(!pair.shared.join("bad.img").exists());
    let mut names = fs::read_dir(&pair.shared).unwrap().map(|file| file.unwrap().file_name());
    assert!(!names.any(|name| name.to_string_lossy().starts_with(".bad")), "a part is left");
    let journal = dispatcher.run("journalctl -o json MESSAGE_ID=36bf6280841042d98f4b6d42b81c2814 | head -1");
    let entry = json(&journal);
    assert_eq!(
        (&entry["AGENT"], &entry["DISK"]),
        (&"web1".into(), &pair.root.name.as_str().into()),
        "{entry}"
    );
    assert!(entry["CHECKPOINT"].is_string(), "{entry}");
    let status = dispatcher.try_run("blxctl status --json");
    assert_eq!(status.status.code(), Some(6), "damage needs attention");
    let status = json(&String::from_utf8_lossy(&status.stdout));
    let disks = status["daemons"][0]["disks"].as_array().unwrap();
    let root = disks.iter().find(|disk| disk["disk"] == pair.root.name.as_str()).unwrap();
    assert!(root["damage"][0].as_str().unwrap().contains(".img") && root["protected"] == false, "{root}");
    assert_eq!(status["daemons"][0]["scrub"]["damaged"], 1, "{status}");
}
