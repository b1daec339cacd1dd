//! The files people and `blxrep enroll` write, and the names in them.

use std::path::Path;

use crate::checkpoint::select;
use crate::config::value::{Delay, DispatcherAddr, SyncFreq};
use crate::config::{AgentConfig, DispatcherConfig, Settings};
use crate::ids::{AgentId, CheckpointId, DiskId};
use crate::pause;
use crate::wire::key::{AgentKey, Agents};

pub(super) fn check_config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let file = Path::new("config.yaml");
    match Settings::parse(text, file) {
        Ok(settings) => {
            if let Ok(config) = AgentConfig::new(settings.clone(), file) {
                assert!((9..=20).contains(&config.block_shift) && !config.devices.is_empty());
                assert!(config.freeze_timeout.as_secs() > 0 && config.hook_timeout.as_secs() > 0);
            }
            if let Ok(config) = DispatcherConfig::new(settings, file) {
                assert!(config.sync_every.as_secs() > 0);
            }
        }
        Err(error) => assert!(error.to_string().starts_with("config.yaml: ")),
    }
    if let Ok(SyncFreq(time)) = text.parse::<SyncFreq>() {
        let Delay(same) = format!("{}ms", time.as_millis()).parse().expect("a time in other words");
        assert_eq!(time.as_millis(), same.as_millis());
    }
    if let Ok(addr) = text.parse::<DispatcherAddr>() {
        assert_eq!(addr.as_str().parse(), Ok(addr.clone()), "an address is its own text");
    }
}

pub(super) fn config_seeds() -> Vec<Vec<u8>> {
    let agent = "mode: agent\nid: web1\ndispatcher-addr: backup.example:8080\ndevice: [/dev/sda, /dev/sdb]\n\
                 key-file: /etc/blxrep/key\nstate-dir: /var/lib/blxrep\nhooks-dir: /etc/blxrep/hooks\n\
                 freeze-timeout: 10\nhook-timeout: 5s\nblock-size: 4096\nread-rate-mib: 100\n";
    let dispatcher = "# the other side\nmode: dispatcher\ndata-dir: \"/srv/blxrep\"\nagents-file: /etc/blxrep/agents\n\
                      listen: '[::]:8080'\nsync-freq: 1m 30s\n";
    let one = "device: /dev/sda\nsync-freq: 5\n";
    [agent, dispatcher, one, "backup.example:443", "1h", "90"].map(|text| text.into()).to_vec()
}

fn name<T: std::str::FromStr + std::fmt::Display + PartialEq + std::fmt::Debug>(text: &str) {
    if let Ok(name) = text.parse::<T>() {
        assert_eq!(name.to_string(), text, "a name has one spelling");
        let path = Path::new("snapshot").join(text);
        assert_eq!(path.components().count(), 2, "a name is one component of a path");
        assert_eq!(path.file_name().and_then(|name| name.to_str()), Some(text));
    }
}

pub(super) fn check_agents(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    if let Ok(agents) = Agents::parse(text) {
        for agent in agents.ids() {
            assert!(agents.contains(&agent) && text.contains(agent.as_str()));
            name::<AgentId>(agent.as_str());
        }
    }
    if let Some(key) = AgentKey::from_line(text) {
        let again = AgentKey::from_line(&key.to_line()).expect("a key's own line");
        assert_eq!(again.to_line(), key.to_line());
        assert_eq!(key.to_line().to_lowercase(), text.trim().to_lowercase());
    }
    if let Ok(paused) = pause::parse(text) {
        assert_eq!(pause::parse(&pause::text(&paused)), Ok(paused));
    }
    name::<AgentId>(text);
    name::<DiskId>(text);
    name::<CheckpointId>(text);
    if let Some(id) = DiskId::from_label(text) {
        name::<DiskId>(id.as_str());
    }
    if let Ok(id) = text.parse::<CheckpointId>() {
        assert_eq!(CheckpointId::from_u64(id.to_u64()), Some(id));
        assert_eq!(CheckpointId::next(id.unix_seconds(), None).minute(), id.minute());
        assert_eq!(select::select(&[id], text), Ok(id));
    }
    let _ = select::parse_minute(text);
}

pub(super) fn agents_seeds() -> Vec<Vec<u8>> {
    let hash = "0123456789abcdef".repeat(4);
    let agents = format!("# who may connect\n\nweb1 blake3:{hash}\n  web-2 blake3:{hash} no-restore\n");
    let key = format!("blxrep1:web1:{hash}:{hash}\n");
    let texts = [
        &agents,
        &key,
        "web1 sda\nweb1 nvme0n1\n",
        "agent_1.a-b",
        "20261121203456",
        "20261121203456-65535",
        "202611212034",
        " S3Z9/NX 0 ",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}
