//! A database under load on the agent's disk: every checkpoint of it starts, is sound, and holds just what had been committed.

use std::fs;

use super::hosts::{Disk, Pair};
use super::lab::wait_for;

/// Every commit that the client was told of is in `acknowledged` before the next one is in `issued`, outside of the disk.
const LEDGER: &str = r#"i=0; while :; do i=$((i+1)); echo $i >>/shared/issued
psql -q -c "INSERT INTO ledger VALUES ($i)" postgres && echo $i >>/shared/acknowledged || exit 1; done"#;
/// Behind the photograph, while the disk is frozen still.
const COUNT: &str = r#"#!/bin/sh
[ "$1" = frozen ] || exit 0
for what in issued acknowledged; do tail -n 1 /shared/$what >"/shared/$what-$BLXREP_CHECKPOINT"; done
"#;
/// `mount -o loop`, on a host that has no nodes of loop devices; another test may take the free one first.
const COPY_OUT: &str = r#"for _ in 1 2 3 4 5; do
    n=$(losetup -f | tr -dc 0-9); [ -b /dev/loop$n ] || mknod -m 600 /dev/loop$n b 7 $n
    losetup -r /dev/loop$n /mnt/web1/disk.img && break
done
mount -o OPTIONS /dev/loop$n /mnt/files && cp -a /mnt/files/db /run/db/copy; code=$?
umount /mnt/files; losetup -d /dev/loop$n; exit $code"#;
/// A small disk: little room for the log.
const SETTINGS: &str =
    "shared_buffers = 32MB\nmin_wal_size = 16MB\nmax_wal_size = 48MB\ncheckpoint_timeout = 30s\n";

struct Database<'a> {
    pair: &'a Pair,
    bin: String,
}

impl<'a> Database<'a> {
    /// Makes one on `/data` of the agent, and puts it under load.
    fn start(pair: &'a Pair) -> Self {
        let agent = &pair.agent;
        let bin = agent.run("echo /usr/lib/postgresql/*/bin");
        agent.run(
            "systemctl disable --now --quiet postgresql; install -d -o postgres -g postgres /data/db /run/db",
        );
        let database = Self { pair, bin };
        database.on_agent("initdb --data-checksums --wal-segsize 4 --auth trust -D /data/db >/dev/null");
        agent.run(&format!("printf '{SETTINGS}' >>/data/db/postgresql.conf"));
        database.on_agent("pg_ctl -w -D /data/db -l /run/db/log start >/dev/null");
        database.on_agent("pgbench -q -i -s 2 postgres 2>/dev/null");
        database.on_agent(
            "psql -q -c 'CREATE EXTENSION amcheck; CREATE TABLE ledger (number bigint PRIMARY KEY)' postgres",
        );
        database.background("load", "exec pgbench -n -c 4 -T 3600 postgres");
        database.background("ledger", LEDGER);
        database
    }

    fn as_postgres(&self, command: &str) -> String {
        format!("runuser -u postgres -- env PATH={}:$PATH {command}", self.bin)
    }

    fn on_agent(&self, command: &str) -> String {
        self.pair.agent.run(&self.as_postgres(command))
    }

    fn background(&self, name: &str, script: &str) {
        let script = format!("export PATH={}:$PATH\n{script}", self.bin);
        self.pair.agent.put(&format!("/run/{name}.sh"), "755", &format!("#!/bin/sh\n{script}\n"));
        // What is acknowledged must be written where the client can.
        self.pair
            .agent
            .run("touch /shared/issued /shared/acknowledged; chmod 666 /shared/issued /shared/acknowledged");
        self.pair.agent.run(&format!(
            "systemd-run --quiet --collect --unit {name} --uid postgres --property StandardError=file:/shared/{name}.err /run/{name}.sh"
        ));
    }

    /// Copies a checkpoint's database to `/run/db/copy` on the dispatcher, out of a mount of the checkpoint.
    fn copy_out(&self, disk: &Disk, id: &str, options: &str) {
        let host = &self.pair.dispatcher;
        host.run(&format!("blxctl mount web1 {id} /mnt/web1 --disk {}", disk.name));
        host.run(&COPY_OUT.replace("OPTIONS", options));
        host.run("blxctl umount /mnt/web1");
    }

    /// Brings a checkpoint's database to the dispatcher, starts it there, and looks.
    fn check(&self, disk: &Disk, id: &str, options: &str) {
        let host = &self.pair.dispatcher;
        let sql = |query: &str| {
            let asked = self.as_postgres(&format!("psql -At -h /run/db -p 5433 -c \"{query}\" postgres"));
            host.run(&asked).parse::<i64>().unwrap()
        };
        self.copy_out(disk, id, options);
        let server = "-D /run/db/copy -l /run/db/copy.log -o '-k /run/db -p 5433'";
        host.run(&format!(
            "chown -R postgres /run/db; {}",
            self.as_postgres(&format!("pg_ctl -w {server} start >/dev/null"))
        ));
        let [issued, acknowledged] = ["issued", "acknowledged"].map(|what| {
            let text = fs::read_to_string(self.pair.shared.join(format!("{what}-{id}"))).unwrap();
            text.trim().parse::<i64>().unwrap()
        });
        let (newest, count) = (sql("SELECT max(number) FROM ledger"), sql("SELECT count(*) FROM ledger"));
        eprintln!("{id}: {acknowledged} commits were acknowledged, {newest} are there, {issued} were begun");
        assert!((acknowledged..=issued).contains(&newest), "{id}: {acknowledged}..={issued}, not {newest}");
        assert_eq!(count, newest, "{id}: commits are missing in between");
        // Every transfer of pgbench changes three sums by the same amount, and writes it down.
        let sums = [
            "abalance), 0) FROM pgbench_accounts",
            "bbalance), 0) FROM pgbench_branches",
            "tbalance), 0) FROM pgbench_tellers",
            "delta), 0) FROM pgbench_history",
        ]
        .map(|sum| sql(&format!("SELECT coalesce(sum({sum}")));
        assert!(sums.windows(2).all(|two| two[0] == two[1]), "{id}: {sums:?}");
        host.run(&self.as_postgres("pg_amcheck -h /run/db -p 5433 --heapallindexed --rootdescend postgres"));
        host.run(&self.as_postgres(&format!("pg_ctl -w {server} -m fast stop >/dev/null")));
        host.run(&self.as_postgres("pg_checksums --check -D /run/db/copy >/dev/null"));
        host.run("rm -rf /run/db/copy");
    }
}

fn every_checkpoint_holds_what_was_committed(fs_type: &str, options: &str, checkpoints: usize) {
    let pair = Pair::boot_with(&format!("postgres-{fs_type}"), &["postgresql"]);
    pair.configure();
    pair.configure_disks(&[&pair.data], "");
    pair.agent.put("/etc/blxrep/hooks/zz-count", "755", COUNT);
    pair.agent.run(&format!(
        "umount /data; mkfs.{fs_type} -q -{} {}",
        if fs_type == "xfs" { "f" } else { "F" },
        pair.data.path
    ));
    pair.mount_data();
    pair.dispatcher
        .run("systemctl disable --now --quiet postgresql; install -d -o postgres -g postgres /run/db");
    pair.dispatcher.run("mkdir /mnt/web1 /mnt/files; mknod -m 600 /dev/loop-control c 10 237; mknod -m 666 /dev/fuse c 10 229 || [ -c /dev/fuse ]");
    let database = Database::start(&pair);
    pair.start();
    wait_for("the first checkpoint", 120, || !pair.checkpoints(&pair.data).is_empty());
    pair.more_checkpoints(&pair.data, checkpoints, 180);
    let rows = pair.checkpoints(&pair.data);
    for row in &rows[rows.len() - checkpoints..] {
        assert_eq!(row["consistency"], "application", "{row}");
        database.check(&pair.data, row["checkpoint"].as_str().unwrap(), options);
    }
    for unit in ["load", "ledger"] {
        assert!(pair.agent.is(&format!("systemctl is-active -q {unit}")), "{unit} has ended: it was hurt");
    }
}

#[test]
fn a_database_on_ext4_comes_back_with_every_commit_from_before_the_freeze_and_none_from_after() {
    every_checkpoint_holds_what_was_committed("ext4", "ro", 10);
}

#[test]
fn a_database_on_xfs_comes_back_with_every_commit_from_before_the_freeze_and_none_from_after() {
    // The original is mounted under the same kernel.
    every_checkpoint_holds_what_was_committed("xfs", "ro,norecovery,nouuid", 3);
}
