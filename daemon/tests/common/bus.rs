//! A bus of its own for daemons under test; root may do everything on it.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test ends so")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use blxrep_dbus::proxy::{Details, DiskProxy, JobProxy, ManagerProxy, Options};
use blxrep_dbus::{BUS_NAME_DISPATCHER, disk_path, job_path};
use futures_util::StreamExt;
use zbus::proxy::CacheProperties;

use super::lab::{Lab, mortal};

/// Ends when dropped.
pub struct Bus {
    daemon: Child,
    pub address: String,
}

impl Bus {
    pub fn start(lab: &Lab) -> Self {
        let (config, socket) = (lab.path("bus.conf"), lab.path("bus.socket"));
        let text = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>"#
        );
        fs::write(&config, text).unwrap();
        let mut daemon = mortal("dbus-daemon")
            .arg(format!("--config-file={config}"))
            .args(["--nofork", "--nopidfile", "--print-address=1"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(daemon.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("unix:"), "dbus-daemon did not start: run tools/install-deps test");
        Self { daemon, address: address.trim().to_owned() }
    }

    /// The dispatcher's manager.
    pub async fn dispatcher(&self) -> ManagerProxy<'static> {
        self.manager(BUS_NAME_DISPATCHER).await
    }

    /// The manager of whoever owns this name.
    pub async fn manager(&self, name: &'static str) -> ManagerProxy<'static> {
        let bus = zbus::connection::Builder::address(self.address.as_str()).build().await.unwrap();
        ManagerProxy::builder(&bus)
            .destination(name)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .unwrap()
    }

    /// A disk of the dispatcher.
    pub async fn disk(&self, agent: &str, disk: &str) -> DiskProxy<'static> {
        let bus = zbus::connection::Builder::address(self.address.as_str()).build().await.unwrap();
        let disk = DiskProxy::builder(&bus).destination(BUS_NAME_DISPATCHER).path(disk_path(agent, disk));
        disk.cache_properties(CacheProperties::No).build().await.unwrap()
    }

    /// Bytes done and in all of job 1 and later ones: of the first that runs.
    pub async fn job_bytes(&self) -> Option<(u64, u64)> {
        let bus = zbus::connection::Builder::address(self.address.as_str()).build().await.unwrap();
        for id in 1..10 {
            let job = JobProxy::builder(&bus).destination(BUS_NAME_DISPATCHER).path(job_path(id));
            let job = job.cache_properties(CacheProperties::No).build().await.unwrap();
            if let (Ok(done), Ok(total)) = (job.bytes_done().await, job.bytes_total().await) {
                return Some((done, total));
            }
        }
        None
    }

    /// Syncs, with options, and waits for the job's end.
    pub async fn sync(&self, agent: &str, options: Options<'_>) -> (String, Details) {
        let manager = self.dispatcher().await;
        let mut removed = manager.receive_job_removed().await.unwrap();
        let job = manager.sync(agent, options).await.unwrap();
        loop {
            let signal = removed.next().await.unwrap();
            let args = signal.args().unwrap();
            if args.job.as_str() == job.as_str() {
                return (args.result.clone(), args.details.clone());
            }
        }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
