//! Checkpoints shown by the sandboxed dispatcher: what the caller mounts and listens on, and what is left when it ends.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::hosts::{Host, Pair};
use super::lab::{run, wait_for};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Fails with this exit code, and says this.
fn refused(host: &Host, script: &str, code: i32, says: &str) {
    let output = host.try_run(script);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(code) && said.contains(says), "{script}: {}: {said}", output.status);
}

#[test]
fn checkpoints_are_mounted_and_exported_by_a_dispatcher_that_may_open_neither() {
    let pair = Pair::boot("serve");
    pair.configure();
    pair.write();
    pair.start();
    pair.more_checkpoints(&pair.data, 2, 180);
    let row = pair.checkpoints(&pair.data).pop().unwrap();
    let (id, disk) = (row["checkpoint"].as_str().unwrap().to_owned(), pair.data.name.clone());
    let photo = pair.photo(&pair.data, &row).to_str().unwrap().to_owned();
    for host in [&pair.dispatcher, &pair.agent] {
        host.run("mknod -m 666 /dev/fuse c 10 229 || [ -c /dev/fuse ]; mkdir /mnt/web1");
    }
    let mount = format!("blxctl mount web1 {id} /mnt/web1 --disk {disk} --json");
    mounted(&pair, &mount, &photo);
    exported(&pair, &format!("blxctl export web1 {id} --disk {disk} --socket /shared/nbd.sock"), &photo);

    refused(&pair.agent, &mount, 2, "only the dispatcher");
    let d = &pair.dispatcher;
    refused(d, "blxctl mount web1 209901010000 /mnt/web1 --disk x", 5, "no disk x");
    refused(d, &format!("blxctl mount web1 209901010000 /mnt/web1 --disk {disk}"), 5, "no checkpoint");
    refused(d, &mount.replace("/mnt/web1", "/var"), 2, "not empty");
    refused(d, "blxctl umount /var", 2, "no checkpoint is mounted");
    for host in [d, &pair.agent] {
        assert_eq!(host.run("findmnt -n -t fuse.blxrep || true"), "", "a refused mount is left");
    }

    // A stop is not held up by what is mounted, and leaves something that can be unmounted.
    d.run(&mount);
    let seconds = d.seconds("systemctl restart blxrep-dispatcher");
    assert!(seconds < 30.0, "the restart took {seconds} s");
    assert!(!d.is("cat /mnt/web1/disk.img >/dev/null"));
    d.run("blxctl umount /mnt/web1");
    assert_eq!(d.run("blxctl jobs --json"), "[]");
}

fn mounted(pair: &Pair, mount: &str, photo: &str) {
    let d = &pair.dispatcher;
    let begun = json(&d.run(mount));
    assert_eq!(
        (&begun["target"], &begun["consistency"]),
        (&"/mnt/web1".into(), &"application".into()),
        "{begun}"
    );
    assert_eq!(d.run("ls /mnt/web1"), "disk.img", "the disk has no partitions");
    d.run(&format!(
        "cmp /mnt/web1/disk.img /shared/{}",
        Path::new(photo).file_name().unwrap().to_str().unwrap()
    ));
    let jobs = json(&d.run("blxctl jobs --json"));
    assert_eq!((&jobs[0]["type"], &jobs[0]["target"]), (&"mount".into(), &"/mnt/web1".into()), "{jobs}");
    refused(d, "exec 3</mnt/web1/disk.img; blxctl umount /mnt/web1", 1, "in use");
    d.run("blxctl umount /mnt/web1");
    wait_for("the job to end with the mount", 20, || d.run("blxctl jobs --json") == "[]");

    let job = json(&d.run(mount))["job"].as_u64().unwrap();
    d.run(&format!("blxctl cancel {job}"));
    wait_for("reads to fail", 20, || !d.is("dd if=/mnt/web1/disk.img of=/dev/null bs=1M iflag=direct"));
    wait_for("the job to end", 20, || d.run("blxctl jobs --json") == "[]");
    d.run("blxctl umount /mnt/web1");
}

fn exported(pair: &Pair, export: &str, photo: &str) {
    let d = &pair.dispatcher;
    let (socket, copy) = (pair.shared.join("nbd.sock"), pair.shared.join("copy.img"));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    d.background("export", &format!("exec {export}"));
    wait_for("the socket", 20, || socket.exists());
    refused(d, export, 2, "there already");
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    run("cmp", &[copy.to_str().unwrap(), photo]);
    fs::remove_file(&copy).unwrap();
    d.run("systemctl stop export");
    wait_for("the socket to go", 20, || !socket.exists());
    assert_eq!(d.run("blxctl jobs --json"), "[]");

    let begun = json(&d.run(&format!("{export} --writable --no-wait --json")));
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x77 1M 4k", "-c", "read -P 0x77 1M 4k", &uri]);
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap()[1 << 20..][..4096] == [0x77; 4096]);
    d.run(&format!("blxctl cancel {}", begun["job"]));
    wait_for("the job to end", 20, || d.run("blxctl jobs --json") == "[]");
    for file in [copy, socket] {
        fs::remove_file(file).unwrap();
    }
}
