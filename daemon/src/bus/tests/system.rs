//! Against a private system bus: who calls is what the bus says.
//!
//! These tests need root and `dbus-daemon`, and fail where one of them is missing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};

use blxrep_dbus::{ACTION_CHECKPOINT, ACTION_RESTORE, BUS_NAME_DISPATCHER};
use tempfile::TempDir;
use tokio::task::spawn_blocking;
use zbus::message::Flags;
use zbus::names::BusName;

use super::*;
use crate::bus::stay_on_bus;

const POLICY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dbus/org.blxrep.conf");

/// A bus of its own; ends when dropped.
struct Bus {
    daemon: Child,
    address: String,
    dir: TempDir,
}

impl Bus {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Another user connects to it.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (daemon, address) = spawn(&dir);
        Self { daemon, address, dir }
    }

    fn stop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }

    fn start_again(&mut self) {
        self.stop();
        let _ = fs::remove_file(self.dir.path().join("socket"));
        (self.daemon, self.address) = spawn(&self.dir);
    }

    async fn connect(&self) -> Connection {
        Builder::address(self.address.as_str()).build().await.unwrap()
    }

    /// Serves the fake over this bus until it is dropped.
    fn serve(&self, fake: &Arc<Fake>) -> Serving {
        let daemon = Manager::new(fake.clone(), Access::Polkit);
        let address = self.address.clone();
        Serving(tokio::spawn(async move {
            let (_added, checkpoints) = broadcast::channel(4);
            stay_on_bus(&daemon, || Builder::address(address.as_str()), &checkpoints).await;
        }))
    }

    /// Calls Sync as another user.
    async fn sync_as_nobody(&self) -> String {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "dbus-send"]);
        command
            .arg(format!("--bus={}", self.address))
            .args(["--print-reply", "--dest=org.blxrep.Dispatcher"]);
        command.args([
            "/org/blxrep/Manager",
            "org.blxrep.Manager.Sync",
            "string:web1",
            "dict:string:variant:",
        ]);
        let run = move || command.output();
        let output: Output =
            spawn_blocking(run).await.unwrap().expect("setpriv: run tools/install-deps test");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(dir: &TempDir) -> (Child, String) {
    let config = dir.path().join("bus.conf");
    let text = format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={}/socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_type="signal"/>
  </policy>
  <policy user="root">
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="*"/>
    <allow receive_type="method_call"/>
  </policy>
  <include>{POLICY}</include>
</busconfig>"#,
        dir.path().display()
    );
    fs::write(&config, text).unwrap();
    let mut daemon = Command::new("dbus-daemon")
        .arg(format!("--config-file={}", config.display()))
        .args(["--nofork", "--nopidfile", "--print-address=1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("dbus-daemon cannot be started: run tools/install-deps test");
    let mut address = String::new();
    BufReader::new(daemon.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
    assert!(
        address.starts_with("unix:"),
        "dbus-daemon refused its configuration (are these tests run as root?)"
    );
    (daemon, address.trim().to_owned())
}

struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn until_owned(connection: &Connection, name: &'static str) {
    let bus = zbus::fdo::DBusProxy::new(connection).await.unwrap();
    let wait = async {
        while !bus.name_has_owner(BusName::try_from(name).unwrap()).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{name} was not taken"));
}

/// Says what it is made to, as polkit would.
#[derive(Clone, Default)]
struct FakePolkit {
    answer: Arc<Mutex<Option<(bool, bool)>>>,
    asked: Arc<Mutex<Vec<Question>>>,
}

#[derive(Debug)]
struct Question {
    kind: String,
    action: String,
    details: HashMap<String, String>,
    flags: u32,
}

#[zbus::interface(name = "org.freedesktop.PolicyKit1.Authority")]
impl FakePolkit {
    async fn check_authorization(
        &self,
        subject: (String, HashMap<String, OwnedVariant>),
        action: String,
        details: HashMap<String, String>,
        flags: u32,
        _cancellation_id: String,
    ) -> zbus::fdo::Result<((bool, bool, HashMap<String, String>),)> {
        self.asked.lock().unwrap().push(Question { kind: subject.0, action, details, flags });
        let answer = *self.answer.lock().unwrap();
        let (granted, challenge) = answer.ok_or_else(|| zbus::fdo::Error::Failed("out of order".into()))?;
        Ok(((granted, challenge, HashMap::new()),))
    }
}

async fn polkit_on(bus: &Bus) -> (FakePolkit, Connection) {
    let polkit = FakePolkit::default();
    let connection = bus.connect().await;
    connection.object_server().at("/org/freedesktop/PolicyKit1/Authority", polkit.clone()).await.unwrap();
    connection.request_name("org.freedesktop.PolicyKit1").await.expect("these tests need root");
    (polkit, connection)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_polkit_root_may_everything_and_others_nothing() {
    let bus = Bus::start();
    let fake = Arc::<Fake>::default();
    let _serving = bus.serve(&fake);
    let root = bus.connect().await;
    until_owned(&root, BUS_NAME_DISPATCHER).await;
    let manager = ManagerProxy::builder(&root).destination(BUS_NAME_DISPATCHER).build().await.unwrap();
    manager.sync("web1", none()).await.unwrap();
    assert_eq!(fake.take().len(), 1);
    let said = bus.sync_as_nobody().await;
    assert!(said.contains("org.freedesktop.DBus.Error.AccessDenied"), "{said}");
    assert!(said.contains(ACTION_CHECKPOINT) && said.contains("only root"), "{said}");
    assert_eq!(fake.take(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_polkit_others_may_what_it_grants() {
    let bus = Bus::start();
    let fake = Arc::<Fake>::default();
    let (polkit, connection) = polkit_on(&bus).await;
    let _serving = bus.serve(&fake);
    until_owned(&connection, BUS_NAME_DISPATCHER).await;
    for (answer, says) in [
        (Some((false, false)), "is not granted"),
        (Some((false, true)), "needs authentication"),
        (None, "failed to decide"),
    ] {
        *polkit.answer.lock().unwrap() = answer;
        let said = bus.sync_as_nobody().await;
        assert!(said.contains("AccessDenied") && said.contains(ACTION_CHECKPOINT), "{said}");
        assert!(said.contains(says), "{says}: {said}");
    }
    assert_eq!(fake.take(), Vec::<String>::new());
    *polkit.answer.lock().unwrap() = Some((true, false));
    let said = bus.sync_as_nobody().await;
    assert!(said.contains("object path \"/org/blxrep/job/1\""), "{said}");
    assert_eq!(fake.take(), ["sync web1 None"]);
    let asked = std::mem::take(&mut *polkit.asked.lock().unwrap());
    let last = asked.last().unwrap();
    assert_eq!(
        (asked.len(), last.kind.as_str(), last.action.as_str()),
        (4, "system-bus-name", ACTION_CHECKPOINT)
    );
    assert_eq!(last.flags, 0, "dbus-send does not let a person be asked");
    let details = [("agent", "web1"), ("disk", "-"), ("checkpoint", "-"), ("target", "-")];
    assert_eq!(last.details, details.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_is_asked_only_where_the_call_allows_it() {
    let bus = Bus::start();
    let (polkit, connection) = polkit_on(&bus).await;
    *polkit.answer.lock().unwrap() = Some((true, false));
    let about = About { target: "/t".into(), ..About::default() };
    for (flags, expected) in [(Flags::ALLOW_INTERACTIVE_AUTH, 1), (Flags::NO_AUTO_START, 0)] {
        let call = Message::method_call("/x", "X").sender(":1.999").with_flags(flags);
        let call = call.build(&()).unwrap();
        let header = call.header();
        Access::Polkit.check(&connection, &header, 1000, ACTION_RESTORE, &about).await.unwrap();
        let asked = polkit.asked.lock().unwrap().pop().unwrap();
        assert_eq!((asked.flags, asked.details["target"].as_str()), (expected, "/t"));
        let nobody = Access::Polkit.caller_uid(&connection, &header).await.unwrap_err();
        assert_eq!(nobody.kind, ProblemKind::AccessDenied, "the bus knows no such sender");
    }
}

#[tokio::test]
async fn without_a_bus_nobody_is_root() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Builder::unix_stream(ours).server(Guid::generate()).p2p().build();
    let (server, _client) = tokio::try_join!(server, Builder::unix_stream(theirs).p2p().build()).unwrap();
    let call = Message::method_call("/x", "X").sender(":1.1").build(&()).unwrap();
    let denied = Access::Polkit.caller_uid(&server, &call.header()).await.unwrap_err();
    assert_eq!(denied.kind, ProblemKind::AccessDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_that_goes_away_is_entered_again() {
    let mut bus = Bus::start();
    let fake = Arc::<Fake>::default();
    let _serving = bus.serve(&fake);
    until_owned(&bus.connect().await, BUS_NAME_DISPATCHER).await;
    bus.start_again();
    let root = bus.connect().await;
    until_owned(&root, BUS_NAME_DISPATCHER).await;
    let manager = ManagerProxy::builder(&root).destination(BUS_NAME_DISPATCHER).build().await.unwrap();
    assert_eq!(manager.role().await.unwrap(), "dispatcher");
}
