//! Both machines with blxrep installed, and how their checkpoints are checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blxrep::tracker::Gap;
use serde_json::Value;

use super::guest::Guest;
use super::janitor::Janitor;
use super::lab::{BLXREP, run, wait_for};
use super::stage::install;

/// The agent's disks as `/etc/disks` lists them.
const DISKS: usize = 6;
/// What they are made of (`guest/usr/local/sbin/disks`), and a disk for the photographs: driver, name and MiB.
const AGENT_DISKS: &[(&str, &str, u64)] = &[
    ("virtio-blk-pci", "virtio", 32),
    ("nvme", "nvme", 32),
    ("virtio-blk-pci", "volumes", 128),
    ("virtio-blk-pci", "left", 32),
    ("virtio-blk-pci", "right", 32),
    ("virtio-blk-pci", "locked", 48),
    ("virtio-blk-pci", SPARE, 32),
    ("virtio-blk-pci", "photos", 4096),
];
/// What the disk named `virtio` is restored to.
const SPARE: &str = "spare";
const DISPATCHER_DISKS: &[(&str, &str, u64)] = &[("virtio-blk-pci", "store", 4096)];
/// The hook that photographs a disk while it is frozen, durably: behind the power cut it must still be there. What is free is told to the disk
/// behind the freeze, and not by a writer that knows nothing of freezes: a trim goes through them.
const PHOTOGRAPH: &str = r#"#!/bin/sh
photo=/photos/$(basename "$BLXREP_DEVICE")-$BLXREP_CHECKPOINT
case $1 in
post-thaw) # dm-crypt passes none on.
    lsblk --noheadings --raw --output MOUNTPOINT "$BLXREP_DEVICE" | grep / | xargs --no-run-if-empty fstrim || true ;;
frozen)
    dd if="$BLXREP_DEVICE" of="$photo.part" bs=1M iflag=direct conv=sparse,fsync status=none
    truncate -s "$(blockdev --getsize64 "$BLXREP_DEVICE")" "$photo.part" && mv "$photo.part" "$photo" && sync "$photo" /photos ;;
esac"#;

/// Two machines.
pub struct Pair {
    pub agent: Guest,
    pub dispatcher: Guest,
    dir: PathBuf,
    /// Which checkpoint the spare disk holds.
    restored: Option<String>,
    // The last to go.
    _janitor: Janitor,
}

impl Pair {
    /// Boots both, for the first time.
    pub fn boot(agent_kernel: &str, dispatcher_kernel: &str) -> Self {
        assert!(nix::unistd::Uid::effective().is_root(), "this test needs root: run 'sudo make test-vm'");
        let tool = format!("{}/../tools/vm-root", env!("CARGO_MANIFEST_DIR"));
        let cache = PathBuf::from(run(&tool, &[agent_kernel, dispatcher_kernel]));
        let dir = PathBuf::from(format!("/var/tmp/blxrep-vm-{}-{agent_kernel}", std::process::id()));
        fs::create_dir_all(dir.join("mnt")).unwrap();
        let janitor = Janitor::new(&dir);
        install(&dir.join("stage"));
        make_root(&cache, agent_kernel, &dir, "agent", "10.99.0.2", "photos /photos");
        make_root(
            &cache,
            dispatcher_kernel,
            &dir,
            "dispatcher",
            "10.99.0.1",
            "store /var/lib/blxrep-dispatcher",
        );
        fs::remove_dir_all(dir.join("stage")).unwrap();
        make_disks(&dir, AGENT_DISKS);
        make_disks(&dir, DISPATCHER_DISKS);
        for label in ["photos", "store"] {
            let image = dir.join(format!("{label}.img"));
            run("mke2fs", &["-q", "-F", "-t", "ext4", "-L", label, image.to_str().unwrap()]);
        }
        let agent = Guest::new(["agent", "dispatcher"], agent_kernel, &cache, &dir, AGENT_DISKS);
        let dispatcher =
            Guest::new(["dispatcher", "agent"], dispatcher_kernel, &cache, &dir, DISPATCHER_DISKS);
        let mut pair = Self { agent, dispatcher, dir, restored: None, _janitor: janitor };
        pair.dispatcher.switch_on();
        pair.agent.switch_on();
        pair.dispatcher.wait_booted();
        pair.agent.wait_booted();
        pair
    }

    /// Switches the agent's machine on again.
    pub fn boot_agent(&mut self) {
        self.agent.switch_on();
        self.agent.wait_booted();
    }

    /// Makes the agent's disks, and does what README tells a new user to do.
    pub fn configure(&self) {
        let (dispatcher, agent) = (&self.dispatcher, &self.agent);
        agent.run("disks make && systemctl enable --now --quiet disks");
        dispatcher.run("cp /usr/share/doc/blxrep/config.example.yaml /etc/blxrep/config.yaml");
        dispatcher.run("sed -i 's/^sync-freq: .*/sync-freq: 5s/' /etc/blxrep/config.yaml");
        let key = dispatcher.run("runuser -u blxrep -- blxrep enroll web1");
        agent.put("/etc/blxrep/key", "600", &key);
        agent.put("/etc/blxrep/hooks/photograph", "755", PHOTOGRAPH);
        let devices = agent.run("paste -s -d , /etc/disks");
        let config = format!(
            "id: web1\ndispatcher-addr: 10.99.0.1:8080\ndevice: [{devices}]\nkey-file: /etc/blxrep/key\n\
             hooks-dir: /etc/blxrep/hooks\nhook-timeout: 60s\nfreeze-timeout: 60s"
        );
        agent.put("/etc/blxrep/config.yaml", "644", &config);
    }

    /// Starts both services for good.
    pub fn start(&self) {
        self.dispatcher.run("systemctl enable --now --quiet blxrep-dispatcher");
        self.agent.run("systemctl enable --now --quiet blxrep-agent");
    }

    fn rows(&self) -> Vec<Value> {
        // A process of the guest takes long: not one behind the other.
        let show =
            "sleep 2; blxrep dispatcher show --json --agent web1 --data-dir /var/lib/blxrep-dispatcher";
        serde_json::from_str(&self.dispatcher.try_run(show).out).unwrap_or_default()
    }

    /// How many checkpoints each disk has.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for row in self.rows() {
            *counts.entry(row["disk"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        counts
    }

    /// Whether every disk has at least so many checkpoints.
    pub fn all_have(&self, least: impl Fn(&str) -> usize) -> bool {
        let counts = self.counts();
        counts.len() == DISKS && counts.iter().all(|(disk, count)| *count >= least(disk))
    }

    /// Fails unless every disk was copied once, and compared because of the power cut. Compares for other reasons may come: where
    /// everything takes long, kernels skip a run of the probe now and then, and say so.
    pub fn assert_compared(&self) {
        let journal = self.dispatcher.run("journalctl --no-pager -o cat -u blxrep-dispatcher");
        let said = |text: &str| journal.lines().filter(|line| *line == text).count();
        assert_eq!(said("attached: full copy"), DISKS, "disks that were copied:\n{journal}");
        let compared = format!("gap: {}; the whole disk is compared", Gap::NewTracker);
        assert_eq!(said(&compared), DISKS, "disks that were compared:\n{journal}");
    }

    /// Restores a disk to another one of the agent's. The power is cut in the middle, which is said when it is on again; and once more as soon
    /// as a restore is said to be done, when all must be there.
    pub fn restore_through_power_cuts(&mut self) {
        let rows = self.rows();
        let newest = rows.iter().rfind(|row| row["disk"] == "virtio").unwrap();
        let id = newest["checkpoint"].as_str().unwrap();
        let spare = format!("/dev/disk/by-id/virtio-{SPARE}");
        let restore = format!("blxctl restore --disk virtio {id} {spare} --overwrite {spare}");
        self.agent.run(&format!(
            "systemd-run --quiet {restore}; until [ -s /var/lib/blxrep/web1.unfinished ]; do sleep 0.05; done"
        ));
        self.agent.power_cut();
        self.boot_agent();
        let holds_a_part = format!("holds only a part of checkpoint {id}");
        // The agent may have been started before its disks were there.
        wait_for("the agent to say what is half restored", 300, || {
            self.agent.try_run("blxctl status").out.contains(&holds_a_part)
        });
        self.agent.run(&restore);
        self.agent.power_cut();
        self.restored = Some(format!("--disk virtio --checkpoint {id}"));
    }

    /// Switches the dispatcher off as well, restores every checkpoint from the dispatcher's disk, and compares it with its photograph.
    pub fn compare_with_photographs(&mut self) {
        let rows = self.rows();
        self.dispatcher.power_off();
        let mut script = String::from(
            "mount -o loop store.img mnt; mkdir photographs; mount -o loop photos.img photographs\n",
        );
        for row in &rows {
            assert_eq!(row["consistency"], "application", "{row}");
            let [disk, id, device] = ["disk", "checkpoint", "device"].map(|key| row[key].as_str().unwrap());
            let photo = Path::new(device).file_name().unwrap().to_string_lossy();
            script += &format!(
                "{BLXREP} dispatcher restore --agent web1 --data-dir mnt --disk {disk} --checkpoint {id} --output restored\n\
                 cmp restored photographs/{photo}-{id}; rm restored\n"
            );
        }
        let restored = self.restored.as_ref().unwrap();
        script += &format!(
            "{BLXREP} dispatcher restore --agent web1 --data-dir mnt {restored} --output restored\ncmp restored {SPARE}.img\n"
        );
        in_own_mounts(&self.dir, &script);
        eprintln!("{} checkpoints are what their photographs show", rows.len());
    }
}

/// Runs a script in a directory; what it mounts goes with it.
fn in_own_mounts(dir: &Path, script: &str) {
    let script = format!("cd {}\n{script}", dir.display());
    run("unshare", &["--mount", "--propagation", "private", "sh", "-euc", &script]);
}

fn make_disks(dir: &Path, disks: &[(&str, &str, u64)]) {
    for (_, name, size_mib) in disks {
        fs::File::create(dir.join(format!("{name}.img"))).unwrap().set_len(size_mib << 20).unwrap();
    }
}

/// Makes a machine's root: that of the kernel, with blxrep and what `guest/` holds; `mount` is a label and a directory.
fn make_root(cache: &Path, kernel: &str, dir: &Path, name: &str, ip: &str, mount: &str) {
    let guest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/guest");
    let (label, place) = mount.split_once(' ').unwrap();
    let base = cache.join(format!("{kernel}.img"));
    let script = format!(
        "cp --sparse=always {base} {name}.img
         mount -o loop,offset=1M {name}.img mnt
         cp -a --no-preserve=ownership stage/. {guest}/. mnt
         echo {name} >mnt/etc/hostname
         mkdir -p mnt{place}
         echo 'LABEL={label} {place} ext4 defaults 0 2' >>mnt/etc/fstab
         printf '[Match]\\nName=eth0\\n[Network]\\nAddress={ip}/24\\nLinkLocalAddressing=no\\n' >mnt/etc/systemd/network/eth0.network
         systemd-sysusers --root=mnt
         systemctl --quiet --root=mnt enable control systemd-networkd",
        base = base.display()
    );
    in_own_mounts(dir, &script);
}
