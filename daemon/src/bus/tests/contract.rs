//! The introspection files and the client's proxies are what the code serves.

use std::collections::BTreeSet;
use std::path::Path;

use blxrep_dbus::proxy::DiskProxy;
use blxrep_dbus::{disk_path, words};
use zbus::object_server::Interface;

use super::*;
use crate::bus::disks::DiskObject;
use crate::bus::job::{Job, JobObject};

const HEAD: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<!-- Generated from daemon/src/bus by: BLXREP_WRITE_XML=1 cargo test -p blxrep bus::tests::contract
     What everything means is said in dbus/src/proxy.rs. -->
<node>
"#;

const PROXIES: &str = include_str!("../../../../dbus/src/proxy.rs");

fn xml(object: &impl Interface) -> String {
    let mut text = HEAD.to_owned();
    object.introspect_to_writer(&mut text, 2);
    text.push_str("</node>\n");
    text
}

fn interfaces() -> [(&'static str, String); 3] {
    let access = Access::Told(Arc::default());
    let manager = Manager::new(Arc::<Fake>::default(), access.clone());
    let job = Arc::new(Job::new(1, words::JobType::Sync, About::default(), 0));
    [
        ("Manager", xml(&manager)),
        ("Job", xml(&JobObject { job, access })),
        ("Disk", xml(&DiskObject::new(disk("a")))),
    ]
}

#[test]
fn the_introspection_files_are_what_the_code_serves() {
    for (name, text) in interfaces() {
        let file = format!("{}/../dbus/org.blxrep.{name}.xml", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("BLXREP_WRITE_XML").is_some() {
            std::fs::write(Path::new(&file), &text).unwrap();
        }
        let there = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            there == text,
            "dbus/org.blxrep.{name}.xml is not what the code serves. If the contract was meant to change, write it \
             anew: BLXREP_WRITE_XML=1 cargo test -p blxrep bus::tests::contract\n{text}"
        );
    }
}

/// The members that a proxy's trait names: what they are, and their names on the bus.
fn proxy_members(interface: &str) -> BTreeSet<(String, String)> {
    let (_, rest) = PROXIES.split_once(&format!("pub trait {interface} {{")).unwrap();
    let (body, _) = rest.split_once("\n}").unwrap();
    let mut members = BTreeSet::new();
    let mut attribute = "";
    for line in body.lines().map(str::trim) {
        if line.starts_with("#[zbus(") {
            attribute = line;
        } else if let Some(name) = line.strip_prefix("fn ").and_then(|rest| rest.split('(').next()) {
            let of = |key| {
                attribute.split_once(&format!("{key} = \"")).and_then(|(_, rest)| rest.split('"').next())
            };
            let what = match attribute {
                a if a.contains("signal)") => "signal".to_owned(),
                a if a.contains("property") => {
                    format!("property {}", of("emits_changed_signal").unwrap_or("true"))
                }
                _ => "method".to_owned(),
            };
            members.insert((what, of("name").map_or_else(|| pascal_case(name), str::to_owned)));
            attribute = "";
        }
    }
    members
}

fn pascal_case(name: &str) -> String {
    let upper = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').map(upper).collect()
}

/// The members that the code serves, in the same form.
fn served_members(xml: &str) -> BTreeSet<(String, String)> {
    let mut members = BTreeSet::new();
    let mut property = None;
    for line in xml.lines().map(str::trim) {
        let name = || line.split_once("name=\"").unwrap().1.split('"').next().unwrap().to_owned();
        if line.starts_with("<method ") || line.starts_with("<signal ") {
            members.insert((line[1..7].to_owned(), name()));
        } else if line.starts_with("<property ") {
            members.insert(("property true".to_owned(), name()));
            property = Some(name());
        } else if line.contains("EmitsChangedSignal") {
            let property = property.take().unwrap();
            members.remove(&("property true".to_owned(), property.clone()));
            let emits = line.split_once("value=\"").unwrap().1.split('"').next().unwrap();
            members.insert((format!("property {emits}"), property));
        }
    }
    members
}

#[test]
fn the_proxies_name_exactly_what_is_served() {
    for (name, xml) in interfaces() {
        let served = served_members(&xml);
        assert!(served.len() >= 12, "{name}: {served:?}");
        assert_eq!(proxy_members(name), served, "{name}");
    }
}

pub(super) async fn disk_proxy(world: &World, path: &str) -> DiskProxy<'static> {
    let builder = DiskProxy::builder(&world.client).destination(PEER);
    builder.path(path.to_owned()).build().await.unwrap()
}

#[tokio::test]
async fn every_property_can_be_read_through_its_proxy() {
    let fake = Arc::<Fake>::default();
    fake.disks.lock().unwrap().push(disk("a"));
    let world = World::start_with(fake).await;
    let (go, wait) = std::sync::mpsc::channel::<()>();
    world.fake.will(move |_| wait.recv().map(|()| Details::new()).map_err(|_| unreachable!()));
    let job = world.job(&world.manager().await.sync("web1", none()).await.unwrap()).await;
    let disk = disk_proxy(&world, &disk_path("web1", "a")).await;
    let manager = world.manager().await;
    /// Reads properties; the proxies' types are the contract's, so a wrong signature is an error.
    macro_rules! read {
        ($proxy:ident: $($property:ident)+) => { $(
            $proxy.$property().await.unwrap_or_else(|e| panic!("{}.{}: {e}", stringify!($proxy), stringify!($property)));
        )+ };
    }
    read!(manager: role version agents);
    read!(job: id job_type agent disk checkpoint target started_by_uid state progress bytes_done bytes_total rate_bytes);
    read!(disk: agent id device size_bytes state paused paused_by progress dirty_bytes last_checkpoint
        last_checkpoint_usec lag_usec consistency sync_every_usec last_error);
    go.send(()).unwrap();
}

/// Also the arguments of the signals are what the proxies say.
#[tokio::test]
async fn every_signal_can_be_heard_through_its_proxy() {
    let world = World::start().await;
    let manager = world.manager().await;
    let mut begun = manager.receive_job_new().await.unwrap();
    let mut ended = manager.receive_job_removed().await.unwrap();
    let mut added = manager.receive_checkpoint_added().await.unwrap();
    let path = manager.sync("web1", none()).await.unwrap();
    let id = "20261121203456".parse().unwrap();
    world.added.send(CheckpointAdded { agent: agent_id("web1"), disk: disk_id("a"), id }).unwrap();
    let heard = async {
        let (begun, ended, added) =
            (begun.next().await.unwrap(), ended.next().await.unwrap(), added.next().await.unwrap());
        assert_eq!(begun.args().unwrap().job, path);
        let ended = ended.args().unwrap();
        assert_eq!((ended.id, ended.result.as_str(), ended.details.len()), (1, "done", 0));
        assert_eq!(added.args().unwrap().id, "20261121203456");
    };
    timeout(PATIENCE, heard).await.unwrap();
}
