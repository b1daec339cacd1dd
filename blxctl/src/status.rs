//! What is known of the daemons, and how it is shown. Pure.

use blxrep_dbus::{BUS_NAME_AGENT, BUS_NAME_DISPATCHER};
use serde_json::json;

/// The two daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// Tracks this host's disks and sends what changes.
    Agent,
    /// Receives and keeps.
    Dispatcher,
}

impl Role {
    pub(crate) const ALL: [Self; 2] = [Self::Agent, Self::Dispatcher];

    pub(crate) fn bus_name(self) -> &'static str {
        match self {
            Self::Agent => BUS_NAME_AGENT,
            Self::Dispatcher => BUS_NAME_DISPATCHER,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Dispatcher => "dispatcher",
        }
    }
}

/// Who owns a daemon's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The process, where the bus knows it.
    pub(crate) pid: Option<u32>,
    /// The process's systemd unit, where systemd is on the bus.
    pub(crate) unit: Option<String>,
}

/// One daemon; without an owner it is not on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Daemon {
    pub(crate) role: Role,
    pub(crate) owner: Option<Owner>,
}

/// For people.
pub(crate) fn table(daemons: &[Daemon]) -> String {
    let mut out = format!("{:<12}{:<12}{:<10}{}\n", "ROLE", "ON THE BUS", "PID", "UNIT");
    for daemon in daemons {
        let owner = daemon.owner.clone().unwrap_or_default();
        let on_bus = if daemon.owner.is_some() { "yes" } else { "no" };
        let pid = owner.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let unit = owner.unit.unwrap_or_else(|| "-".to_owned());
        out.push_str(&format!("{:<12}{on_bus:<12}{pid:<10}{unit}\n", daemon.role.as_str()));
    }
    if exit_code(daemons) != 0 {
        out.push_str(concat!(
            "\nThe daemons of version ",
            env!("CARGO_PKG_VERSION"),
            " do not take their bus names yet. Whether they run:\n",
            "  systemctl status blxrep-agent blxrep-dispatcher\n"
        ));
    }
    out
}

/// For programs: one object a daemon, `null` where something is not known.
pub(crate) fn json(daemons: &[Daemon]) -> String {
    let object = |daemon: &Daemon| {
        let owner = daemon.owner.clone().unwrap_or_default();
        json!({
            "role": daemon.role.as_str(),
            "bus_name": daemon.role.bus_name(),
            "on_bus": daemon.owner.is_some(),
            "pid": owner.pid,
            "unit": owner.unit,
        })
    };
    let objects: Vec<_> = daemons.iter().map(object).collect();
    format!("{:#}\n", serde_json::Value::Array(objects))
}

/// 0 if one of them is on the bus, or else 3.
pub(crate) fn exit_code(daemons: &[Daemon]) -> u8 {
    if daemons.iter().any(|daemon| daemon.owner.is_some()) { 0 } else { 3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemons() -> Vec<Daemon> {
        let owner = Owner { pid: Some(812), unit: Some("blxrep-dispatcher.service".to_owned()) };
        vec![Daemon { role: Role::Agent, owner: None }, Daemon { role: Role::Dispatcher, owner: Some(owner) }]
    }

    #[test]
    fn the_table_names_who_is_there_and_who_is_not() {
        assert_eq!(
            table(&daemons()),
            "ROLE        ON THE BUS  PID       UNIT\n\
             agent       no          -         -\n\
             dispatcher  yes         812       blxrep-dispatcher.service\n"
        );
        assert_eq!(exit_code(&daemons()), 0);
    }

    #[test]
    fn where_nobody_is_there_it_says_why_and_what_to_do() {
        let none = &daemons()[..1];
        assert_eq!(exit_code(none), 3);
        assert!(
            table(none).contains("do not take their bus names yet")
                && table(none).contains("systemctl status")
        );
    }

    #[test]
    fn json_has_a_null_for_what_is_not_known() {
        let parsed: serde_json::Value = serde_json::from_str(&json(&daemons())).unwrap();
        assert_eq!(parsed[0]["pid"], serde_json::Value::Null);
        assert_eq!(parsed[0]["on_bus"], false);
        assert_eq!(parsed[1]["pid"], 812);
        assert_eq!(parsed[1]["bus_name"], "org.blxrep.Dispatcher");
    }
}
