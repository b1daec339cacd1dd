//! Who may do what: root, nobody, and nobody with a rule of polkit's.

use super::hosts::Pair;
use super::lab::wait_for;

const PAUSE: &str =
    "busctl call org.blxrep.Dispatcher /org/blxrep/Manager org.blxrep.Manager Pause 'sa{sv}' web1 0";
const RESTORE: &str = "busctl call org.blxrep.Dispatcher /org/blxrep/Manager org.blxrep.Manager Restore 'sssa{sv}' \
                       web1 latest /var/lib/blxrep-dispatcher/x.img 0";
const RULE: &str = r#"polkit.addRule(function(action, subject) {
    if (action.id == "org.blxrep.pause" && subject.user == "nobody") { return polkit.Result.YES; }
});
"#;

#[test]
fn only_whom_polkit_lets_may_and_root() {
    let pair = Pair::boot("access");
    pair.configure();
    pair.start();
    let host = &pair.dispatcher;
    wait_for("the disks to be known", 60, || host.run("blxctl disks --json").contains("\"agent\": \"web1\""));
    let denied = |script: &str| {
        let output = host.run_as("nobody", script);
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{script}: {text}");
        assert!(text.to_lowercase().contains("denied") || text.contains("org.blxrep."), "{script}: {text}");
        text
    };
    denied(PAUSE);
    denied(RESTORE);
    assert_eq!(host.run_as("nobody", "blxctl pause web1").status.code(), Some(3));
    // Nothing is told of what there is.
    let unknown = denied(&PAUSE.replace("web1", "nosuch"));
    assert!(!unknown.contains("web1"), "{unknown}");
    assert!(!host.run("blxctl disks --json").contains("\"paused\": true"));

    host.put("/etc/polkit-1/rules.d/10-test.rules", "644", RULE);
    host.run("systemctl restart polkit");
    let paused = host.run_as("nobody", PAUSE);
    assert!(paused.status.success(), "{}", String::from_utf8_lossy(&paused.stderr));
    assert!(String::from_utf8_lossy(&paused.stdout).contains("/org/blxrep/disk/web1/"));
    denied(RESTORE);
    denied(&PAUSE.replace("Pause", "Sync"));

    // Without polkit, root alone.
    host.run("systemctl mask --quiet --now polkit");
    denied(&PAUSE.replace("Pause", "Resume"));
    assert!(host.run(&PAUSE.replace("Pause", "Resume")).contains("/org/blxrep/disk/web1/"), "root may");
}
