//! A virtual machine: `tools/test-vm`, and scripts run in it.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use super::lab::{mortal, wait_for};

/// The longest a script may take. A machine that boots answers the first one late.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(240);

/// What a script came to.
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A machine: its disks stay when it is off.
pub struct Guest {
    pub name: &'static str,
    kernel: String,
    peer: &'static str,
    cache: PathBuf,
    dir: PathBuf,
    disks: &'static [(&'static str, &'static str, u64)],
    running: Option<(Child, UnixStream)>,
}

impl Guest {
    /// A machine named `name` that is joined to the one named `peer`; of a disk the driver, the name and the size.
    pub fn new(
        [name, peer]: [&'static str; 2],
        kernel: &str,
        cache: &Path,
        dir: &Path,
        disks: &'static [(&'static str, &'static str, u64)],
    ) -> Self {
        let (cache, dir) = (cache.to_owned(), dir.to_owned());
        Self { name, kernel: kernel.to_owned(), peer, cache, dir, disks, running: None }
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", self.name))
    }

    /// Switches it on. The first script waits until it has booted so far that it can run one.
    pub fn switch_on(&mut self) {
        let _ = fs::remove_file(self.file("control"));
        let log = fs::File::options().create(true).append(true).open(self.file("qemu.log")).unwrap();
        let mut child = mortal(&format!("{}/../tools/test-vm", env!("CARGO_MANIFEST_DIR")))
            .arg(self.name)
            .args([&self.cache, Path::new(&self.kernel), &self.dir])
            .args(self.disks.iter().map(|(driver, name, _)| format!("{driver}:{name}")))
            .env("PEER", self.peer)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut control = None;
        wait_for("the machine to be there", 60, || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "{}: {ended:?}\n{}", self.name, self.last_lines("qemu.log"));
            control = UnixStream::connect(self.file("control")).ok();
            control.is_some()
        });
        let control = control.unwrap();
        control.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        self.running = Some((child, control));
    }

    fn ask(&self, script: &str) -> io::Result<Answer> {
        let (_, control) = self.running.as_ref().expect("the machine is off");
        let mut control = control;
        control.write_all(script.as_bytes())?;
        control.write_all(b"\0")?;
        let mut bytes = Vec::new();
        while bytes.iter().filter(|byte| **byte == 0).count() < 3 {
            let mut buffer = [0; 4096];
            match control.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => bytes.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut parts = text.split('\0').map(str::to_owned);
        let code = parts.next().unwrap().parse().unwrap();
        Ok(Answer { code, out: parts.next().unwrap(), err: parts.next().unwrap() })
    }

    /// Runs a script as root.
    pub fn try_run(&self, script: &str) -> Answer {
        self.ask(script).unwrap_or_else(|error| {
            panic!("{}: {script}: {error}\n{}", self.name, self.last_lines("qemu.log"));
        })
    }

    /// The same, and gives what it printed; the test fails if it fails.
    pub fn run(&self, script: &str) -> String {
        let Answer { code, out, err } = self.try_run(script);
        assert_eq!(code, 0, "{}: {script}\n{out}\n{err}", self.name);
        out
    }

    /// Waits until everything that is to run is started.
    pub fn wait_booted(&self) {
        let state = self.try_run("systemctl is-system-running --wait").out;
        let failed = self.try_run("systemctl --failed --no-legend; uname -r").out;
        eprintln!("{}: {state} {failed}", self.name);
    }

    /// Writes a file.
    pub fn put(&self, path: &str, mode: &str, content: &str) {
        self.run(&format!("install -D -m {mode} /dev/stdin {path} <<'PUT-END'\n{content}\nPUT-END"));
    }

    /// `systemctl poweroff`, and waits for it.
    pub fn power_off(&mut self) {
        self.run("systemctl poweroff --no-block");
        let (mut child, _control) = self.running.take().unwrap();
        wait_for("the machine to power off", 120, || child.try_wait().unwrap().is_some());
    }

    /// Pulls the plug.
    pub fn power_cut(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn last_lines(&self, extension: &str) -> String {
        let text = fs::read(self.file(extension)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() && self.running.is_some() {
            let journal =
                self.ask("journalctl --no-pager -o short-monotonic -n 60").map(|journal| journal.out);
            let console = self.last_lines("console");
            eprintln!("--- {}: console\n{console}\n--- journal\n{}", self.name, journal.unwrap_or_default());
        }
        self.power_cut();
    }
}
