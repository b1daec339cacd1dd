//! The bus contract of blxrep: the names that the daemons, `blxctl`, the bus policy and the polkit actions share.
//!
//! Beside this crate lie `org.blxrep.conf` (who may own and call the names), `org.blxrep.policy` (the polkit actions)
//! and the introspection files `org.blxrep.*.xml`, generated from the daemon's code. Tests keep them and this crate
//! equal. Nothing here may be renamed once it is released: scripts and polkit rules of administrators hold these names.

pub mod problem;
pub mod proxy;
pub mod words;

/// Owned by a running agent. Both roles may run on one host.
pub const BUS_NAME_AGENT: &str = "org.blxrep.Agent";
/// Owned by a running dispatcher.
pub const BUS_NAME_DISPATCHER: &str = "org.blxrep.Dispatcher";

/// The object manager's object; jobs and disks lie below it.
pub const PATH_ROOT: &str = "/org/blxrep";
/// The object of [`INTERFACE_MANAGER`], on both roles.
pub const PATH_MANAGER: &str = "/org/blxrep/Manager";

/// What can be asked and ordered.
pub const INTERFACE_MANAGER: &str = "org.blxrep.Manager";
/// Below it lies one object a running job, by its number.
pub const PATH_JOBS: &str = "/org/blxrep/job";
/// Below it lies one object a disk; see [`disk_path`].
pub const PATH_DISKS: &str = "/org/blxrep/disk";

/// One job under way.
pub const INTERFACE_JOB: &str = "org.blxrep.Job";
/// One disk.
pub const INTERFACE_DISK: &str = "org.blxrep.Disk";

/// What the names of all errors begin with; a dot and the error's own name follow.
pub const ERROR_PREFIX: &str = "org.blxrep.Error";

/// The most jobs that run at once; one more is refused as [`problem::ProblemKind::Busy`].
pub const JOBS_MAX: usize = 32;
/// The most that is kept of a guest's console, in bytes.
pub const BOOT_CONSOLE_MAX_BYTES: usize = 256 << 10;
/// `StartedByUID` of a restore on a dispatcher that an agent began: no user of this host did.
pub const STARTED_BY_AGENT_UID: u32 = u32::MAX;
/// Property changes of one object are signalled no more often than this, in milliseconds.
pub const SIGNAL_INTERVAL_MS: u64 = 500;

/// The path of a disk's object: agent and disk id, each escaped as systemd escapes (sd_bus_path_encode(3)): every byte
/// that is no ASCII letter or digit, and a digit at the beginning, becomes `_` and two hexadecimal digits.
pub fn disk_path(agent: &str, disk: &str) -> String {
    format!("{PATH_DISKS}/{}/{}", escape(agent), escape(disk))
}

/// The path of a job's object.
pub fn job_path(id: u32) -> String {
    format!("{PATH_JOBS}/{id}")
}

fn escape(label: &str) -> String {
    let mut escaped = String::new();
    for (i, byte) in label.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && i > 0) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("_{byte:02x}"));
        }
    }
    if escaped.is_empty() { "_".to_owned() } else { escaped }
}

/// polkit action: see which checkpoints there are. (Agents, disks and jobs are properties, which every user may read.)
pub const ACTION_INSPECT: &str = "org.blxrep.inspect";
/// polkit action: pause and resume.
pub const ACTION_PAUSE: &str = "org.blxrep.pause";
/// polkit action: take a checkpoint now, verify one, or accept a machine or disk that changed.
pub const ACTION_CHECKPOINT: &str = "org.blxrep.checkpoint";
/// polkit action: restore, mount or export.
pub const ACTION_RESTORE: &str = "org.blxrep.restore";
/// Every polkit action.
pub const ACTIONS: [&str; 4] = [ACTION_INSPECT, ACTION_PAUSE, ACTION_CHECKPOINT, ACTION_RESTORE];

/// The details that every check carries; the actions' messages name them as `$(agent)` and so on. `-` stands for what was
/// not given.
pub const POLKIT_DETAILS: [&str; 4] = ["agent", "disk", "checkpoint", "target"];

/// The system user the dispatcher runs as (`systemd/blxrep.sysusers`), and so the owner of its name.
pub const DISPATCHER_USER: &str = "blxrep";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CONF: &str = include_str!("../org.blxrep.conf");
    const POLICY: &str = include_str!("../org.blxrep.policy");

    /// The values of an attribute in the elements that begin with `tag`, comments left out.
    fn values<'a>(xml: &'a str, tag: &str, attribute: &str) -> Vec<&'a str> {
        let mut found = Vec::new();
        let mut rest = xml;
        while let Some((_, after)) = rest.split_once('<') {
            if let Some(comment) = after.strip_prefix("!--") {
                rest = comment.split_once("-->").expect("a comment ends").1;
                continue;
            }
            let (element, after) = after.split_once('>').expect("an element ends");
            if let Some(attributes) = element.strip_prefix(tag).filter(|a| a.starts_with(' ')) {
                let (_, value) = attributes.split_once(&format!(" {attribute}=\"")).unwrap_or_default();
                found.extend(value.split_once('"').map(|(value, _)| value));
            }
            rest = after;
        }
        found
    }

    /// The text of one `<policy ...>` of the bus policy.
    fn section(who: &str) -> &'static str {
        let (_, after) = CONF.split_once(&format!("<policy {who}>")).expect("the section is there");
        after.split_once("</policy>").expect("the section ends").0
    }

    #[test]
    fn the_bus_policy_lets_only_the_daemons_users_own_the_names() {
        let both = vec![BUS_NAME_AGENT, BUS_NAME_DISPATCHER];
        assert_eq!(values(section("context=\"default\""), "deny", "own"), both);
        assert_eq!(values(section("context=\"default\""), "allow", "own"), Vec::<&str>::new());
        assert_eq!(values(section("user=\"root\""), "allow", "own"), both);
        let dispatcher = section(&format!("user=\"{DISPATCHER_USER}\""));
        assert_eq!(values(dispatcher, "allow", "own"), [BUS_NAME_DISPATCHER]);
        assert_eq!(values(CONF, "policy", "context").len() + values(CONF, "policy", "user").len(), 3);
    }

    #[test]
    fn everyone_may_call_because_polkit_decides() {
        let default = section("context=\"default\"");
        assert_eq!(values(default, "allow", "send_destination"), [BUS_NAME_AGENT, BUS_NAME_DISPATCHER]);
    }

    #[test]
    fn the_polkit_actions_are_the_constants_and_none_is_free_for_all() {
        let found: BTreeSet<_> = values(POLICY, "action", "id").into_iter().collect();
        assert_eq!(found, BTreeSet::from(ACTIONS));
        assert_eq!(POLICY.matches("<message>").count(), ACTIONS.len());
        for answer in ["allow_any", "allow_inactive", "allow_active"] {
            assert_eq!(POLICY.matches(&format!("<{answer}>auth_admin")).count(), ACTIONS.len(), "{answer}");
        }
    }

    /// polkit refuses checks with details from anybody but root and the action's owner.
    #[test]
    fn the_dispatchers_user_owns_every_action_and_so_may_name_what_it_asks_for() {
        let owner = format!(
            "<annotate key=\"org.freedesktop.policykit.owner\">unix-user:{DISPATCHER_USER}</annotate>"
        );
        for action in POLICY.split("<action ").skip(1) {
            let (action, _) = action.split_once("</action>").expect("the action ends");
            assert_eq!(action.matches(&owner).count(), 1, "{action}");
            let (_, message) = action.split_once("<message>").expect("there is a message");
            let (message, _) = message.split_once("</message>").expect("the message ends");
            assert!(message.contains("$(agent)") && message.contains("$(disk)"), "{message}");
            for name in message.split("$(").skip(1).filter_map(|rest| rest.split(')').next()) {
                assert!(POLKIT_DETAILS.contains(&name), "{name} is never passed");
            }
        }
    }

    #[test]
    fn the_dispatchers_user_is_the_one_systemd_makes() {
        let sysusers = include_str!("../../systemd/blxrep.sysusers");
        assert!(
            sysusers.lines().any(|line| line.starts_with(&format!("u {DISPATCHER_USER} "))),
            "{sysusers}"
        );
    }

    #[test]
    fn paths_are_escaped_as_systemd_does() {
        assert_eq!(disk_path("web-1.a", "5000c500"), "/org/blxrep/disk/web_2d1_2ea/_35000c500");
        assert_ne!(disk_path("a", "b_2dc"), disk_path("a", "b-c"));
        assert_eq!(job_path(7), "/org/blxrep/job/7");
    }

    #[test]
    fn names_follow_the_rules_of_the_bus() {
        for name in [
            BUS_NAME_AGENT,
            BUS_NAME_DISPATCHER,
            INTERFACE_MANAGER,
            INTERFACE_JOB,
            INTERFACE_DISK,
            ERROR_PREFIX,
        ] {
            assert!(
                name.starts_with("org.blxrep.")
                    && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.')
            );
        }
        assert!(PATH_MANAGER.starts_with(PATH_ROOT) && PATH_ROOT == "/org/blxrep");
    }
}
