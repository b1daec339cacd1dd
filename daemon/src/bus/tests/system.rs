//! Against a private system bus: who calls is what the bus says.
//!
//! These tests need root and `dbus-daemon`, and fail where one of them is missing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};

use blxrep_dbus::{ACTION_CHECKPOINT, BUS_NAME_DISPATCHER};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use zbus::names::BusName;

use super::life::until_canceled;
use super::*;
use crate::bus::{advice, enter, stay_on_bus};

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
            let (bus, mut begun) = (|| Builder::address(address.as_str()), mpsc::channel(1).1);
            stay_on_bus(&daemon, bus, &checkpoints, &mut begun, oneshot::channel().0).await;
        }))
    }

    /// Calls Sync as another user, who may be asked.
    async fn sync_as_nobody(&self) -> String {
        let address = format!("--address={}", self.address);
        let call = ["/org/blxrep/Manager", "org.blxrep.Manager", "Sync", "sa{sv}", "web1", "0"];
        let begin =
            ["busctl", &address, "--allow-interactive-authorization=yes", "call", BUS_NAME_DISPATCHER];
        as_nobody(begin.into_iter().chain(call)).await
    }

    /// Cancels the first job as another user, who may not be asked.
    async fn cancel_as_nobody(&self) -> String {
        let (bus, dest) = (format!("--bus={}", self.address), format!("--dest={BUS_NAME_DISPATCHER}"));
        let call = ["/org/blxrep/job/1", "org.blxrep.Job.Cancel"];
        as_nobody(["dbus-send", &bus, "--print-reply", &dest].into_iter().chain(call)).await
    }
}

async fn as_nobody(args: impl Iterator<Item = &str>) -> String {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).args(args);
    let output: Output = spawn_blocking(move || command.output())
        .await
        .unwrap()
        .expect("setpriv: run tools/install-deps test");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
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
    // Without the bus's own id, which is another one when it is started again.
    (daemon, address.trim().split(',').next().unwrap().to_owned())
}

struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The daemon's manager, as soon as its name is taken.
async fn manager(connection: &Connection) -> ManagerProxy<'static> {
    let bus = zbus::fdo::DBusProxy::new(connection).await.unwrap();
    let wait = async {
        while !bus.name_has_owner(BusName::try_from(BUS_NAME_DISPATCHER).unwrap()).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("the name was not taken: these tests need root");
    ManagerProxy::builder(connection).destination(BUS_NAME_DISPATCHER).build().await.unwrap()
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
    let manager = manager(&root).await;
    fake.will(until_canceled);
    let path = manager.sync("web1", none()).await.unwrap();
    assert_eq!(fake.take().len(), 1);
    let said = bus.sync_as_nobody().await;
    assert!(said.contains("Access denied"), "{said}");
    assert_eq!(fake.take(), Vec::<String>::new());
    let said = bus.cancel_as_nobody().await;
    assert!(said.contains("org.freedesktop.DBus.Error.AccessDenied"), "{said}");
    assert!(said.contains(ACTION_CHECKPOINT) && said.contains("only root"), "{said}");
    let job = JobProxy::builder(&root).destination(BUS_NAME_DISPATCHER).path(path).build().await.unwrap();
    assert_eq!(job.state().await.unwrap(), "running");
    job.cancel().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_polkit_others_may_what_it_grants() {
    let bus = Bus::start();
    let fake = Arc::<Fake>::default();
    let (polkit, root) = polkit_on(&bus).await;
    let _serving = bus.serve(&fake);
    fake.will(until_canceled);
    manager(&root).await.sync("web1", none()).await.unwrap();
    assert_eq!(polkit.asked.lock().unwrap().len(), 0, "root is not asked about");
    for (answer, says) in [
        (Some((false, false)), "is not granted"),
        (Some((false, true)), "needs authentication"),
        (None, "failed to decide"),
    ] {
        *polkit.answer.lock().unwrap() = answer;
        let said = bus.cancel_as_nobody().await;
        assert!(said.contains("AccessDenied") && said.contains(ACTION_CHECKPOINT), "{said}");
        assert!(said.contains(says), "{says}: {said}");
    }
    fake.take();
    *polkit.answer.lock().unwrap() = Some((true, false));
    let said = bus.sync_as_nobody().await;
    assert_eq!(said.trim(), "o \"/org/blxrep/job/2\"");
    assert_eq!(fake.take(), ["sync web1 None false"]);
    assert!(bus.cancel_as_nobody().await.contains("method return"));
    let asked = std::mem::take(&mut *polkit.asked.lock().unwrap());
    let flags: Vec<_> = asked.iter().map(|question| question.flags).collect();
    assert_eq!(flags, [0, 0, 0, 1, 0], "a person is asked only where the call allows it");
    let details = [("agent", "web1"), ("disk", "-"), ("checkpoint", "-"), ("target", "-")];
    let details = HashMap::from(details.map(|(k, v)| (k.to_owned(), v.to_owned())));
    for question in asked {
        assert_eq!(
            (question.kind.as_str(), question.action.as_str()),
            ("system-bus-name", ACTION_CHECKPOINT)
        );
        assert_eq!(question.details, details);
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
    manager(&bus.connect().await).await;
    bus.start_again();
    let root = bus.connect().await;
    assert_eq!(manager(&root).await.role().await.unwrap(), "dispatcher");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_the_daemon_from_its_name_is_said_with_what_to_do() {
    let bus = Bus::start();
    let daemon = Manager::new(Arc::<Fake>::default(), Access::Polkit);
    let advice_for = async |address: &str, name: &'static str| {
        let Err(error) = enter(&daemon, Builder::address(address), name).await else {
            panic!("{name} was given")
        };
        daemon.jobs.detach().await;
        advice(&error, name)
    };
    // The bus of these tests lets nobody own what is not in the policy.
    assert!(advice_for(&bus.address, "org.example.Other").await.contains("org.blxrep.conf"));
    let _other = enter(&daemon, Builder::address(bus.address.as_str()), BUS_NAME_DISPATCHER).await.unwrap();
    assert!(advice_for(&bus.address, BUS_NAME_DISPATCHER).await.contains("Another process owns"));
    assert!(
        advice_for("unix:path=/nonexistent/socket", BUS_NAME_DISPATCHER)
            .await
            .contains("systemctl start dbus")
    );
}
