//! The bus contract of blxrep: the names that the daemons, `blxctl`, the bus policy and the polkit actions share.
//!
//! Beside this crate lie `org.blxrep.conf` (who may own and call the names) and `org.blxrep.policy` (the polkit
//! actions). A test keeps them and these constants equal. Nothing here may be renamed once it is released: scripts and
//! polkit rules of administrators hold these names.

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
/// One job under way.
pub const INTERFACE_JOB: &str = "org.blxrep.Job";
/// One disk.
pub const INTERFACE_DISK: &str = "org.blxrep.Disk";

/// What the names of all errors begin with; a dot and the error's own name follow.
pub const ERROR_PREFIX: &str = "org.blxrep.Error";

/// polkit action: see agents, disks, checkpoints and jobs.
pub const ACTION_INSPECT: &str = "org.blxrep.inspect";
/// polkit action: pause and resume.
pub const ACTION_PAUSE: &str = "org.blxrep.pause";
/// polkit action: take a checkpoint now, or verify one.
pub const ACTION_CHECKPOINT: &str = "org.blxrep.checkpoint";
/// polkit action: restore.
pub const ACTION_RESTORE: &str = "org.blxrep.restore";
/// Every polkit action.
pub const ACTIONS: [&str; 4] = [ACTION_INSPECT, ACTION_PAUSE, ACTION_CHECKPOINT, ACTION_RESTORE];

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

    #[test]
    fn the_dispatchers_user_is_the_one_systemd_makes() {
        let sysusers = include_str!("../../systemd/blxrep.sysusers");
        assert!(
            sysusers.lines().any(|line| line.starts_with(&format!("u {DISPATCHER_USER} "))),
            "{sysusers}"
        );
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
