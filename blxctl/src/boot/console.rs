//! What a machine writes to its serial console: made readable, and watched for the end of its start. Pure.
//!
//! All of it comes from a guest. What must never happen here: a control character that gets through, memory that grows
//! with what a guest writes.

use blxrep_dbus::BOOT_CONSOLE_MAX_BYTES;
use vte::{Params, Parser, Perform};

/// What a guest prints to say more than that it has come up to its login prompt; `ok` behind it is good.
const PROBE: &str = "blxrep-probe: ";
/// Longer lines are broken.
const LINE_MAX_BYTES: usize = 4096;
/// What says that a machine will not come up, and what it means.
const HOPELESS: [(&str, &str); 7] = [
    (
        "No bootable device.",
        "the BIOS found nothing to boot (a UEFI machine needs its firmware, see 'blxctl boot --help')",
    ),
    ("grub>", "the boot loader does not find what it loads"),
    ("grub rescue>", "the boot loader does not find what it loads"),
    ("(initramfs)", "the initial RAM disk does not find the root file system"),
    ("dracut:/#", "the initial RAM disk does not find the root file system"),
    ("Kernel panic - not syncing", "the kernel panicked"),
    ("You are in emergency mode", "systemd ended in emergency mode"),
];

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// A login prompt.
    Login,
    /// The line `blxrep-probe: ok`; any other word is a failure.
    Probe,
}

/// How a start ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// What was waited for came.
    Up,
    /// It did not, and why.
    Failed(String),
}

/// A console that is read.
pub(crate) struct Console {
    parser: Parser,
    screen: Screen,
}

struct Screen {
    awaited: Awaited,
    /// Whole lines; the oldest go when there are too many.
    text: String,
    /// The line that is being written.
    line: String,
    /// The cursor went back to the line's beginning.
    returned: bool,
    verdict: Option<Verdict>,
}

impl Console {
    /// Nothing was written yet.
    pub(crate) fn new(awaited: Awaited) -> Self {
        let screen =
            Screen { awaited, text: String::new(), line: String::new(), returned: false, verdict: None };
        Self { parser: Parser::new(), screen }
    }

    /// Takes what was written next, cut anywhere.
    pub(crate) fn read(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.screen, bytes);
    }

    /// What is known by now. What was found first stays.
    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        self.screen.verdict.as_ref()
    }

    /// Readable lines; the last [`BOOT_CONSOLE_MAX_BYTES`] at most.
    pub(crate) fn into_text(mut self) -> String {
        if !self.screen.line.is_empty() {
            self.screen.end_line();
        }
        self.screen.text
    }
}

impl Screen {
    fn end_line(&mut self) {
        self.returned = false;
        let line = std::mem::take(&mut self.line);
        self.probe(&line);
        self.text.push_str(line.trim_end());
        self.text.push('\n');
        if self.text.len() > BOOT_CONSOLE_MAX_BYTES {
            // Half of it, so that this is rare.
            let from = self.text.len() - BOOT_CONSOLE_MAX_BYTES / 2;
            let cut = self
                .text
                .bytes()
                .skip(from)
                .position(|b| b == b'\n')
                .map_or(self.text.len(), |at| from + at + 1);
            self.text.drain(..cut);
        }
    }

    fn probe(&mut self, line: &str) {
        let said = line.strip_prefix(PROBE).map(str::trim);
        if let (Awaited::Probe, Some(said), None) = (self.awaited, said, &self.verdict) {
            let failed = || Verdict::Failed(format!("the probe says: {said}"));
            self.verdict = Some(if said == "ok" { Verdict::Up } else { failed() });
        }
    }

    /// Looks at a line that a character was added to.
    fn look(&mut self) {
        if self.verdict.is_some() {
            return;
        }
        let hopeless = HOPELESS.iter().find(|(phrase, _)| self.line.ends_with(phrase));
        if let Some((_, why)) = hopeless {
            self.verdict = Some(Verdict::Failed((*why).to_owned()));
        } else if self.awaited == Awaited::Login && is_prompt(&self.line) {
            self.verdict = Some(Verdict::Up);
        }
    }
}

/// Whether this is `login:` with nothing but a host's name before it, as getty writes it.
fn is_prompt(line: &str) -> bool {
    let Some(before) = line.strip_suffix("login:") else { return false };
    let is_host = || before.ends_with(' ') && before.split_whitespace().count() == 1;
    before.is_empty() || is_host()
}

impl Perform for Screen {
    fn print(&mut self, c: char) {
        if self.returned && !self.line.is_empty() {
            self.end_line();
        }
        self.returned = false;
        if c.is_control() {
            return;
        }
        self.line.push(c);
        self.look();
        if self.line.len() >= LINE_MAX_BYTES {
            self.end_line();
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\n' => self.end_line(),
            b'\r' => self.returned = true,
            b'\t' => self.print(' '),
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, _intermediates: &[u8], _ignore: bool, action: char) {
        // All is cleared, or the cursor goes to where a line begins. (A BIOS also sends it where it is.)
        let column = || params.iter().nth(1).and_then(|param| param.first()).copied().unwrap_or(0);
        if (action == 'J' || matches!(action, 'H' | 'f') && column() <= 1) && !self.line.is_empty() {
            self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16.3)\r\nBooting from Hard Disk...\r\nGRUB loading...\r\n\
        \x1b[0;30;47mWelcome to GRUB!\r\n\r\n[\x1b[0;32m  OK  \x1b[0m] Reached target \x1b[0;1;39mGetty… \x1b[0m\r\n\r\r\nDebian GNU/Linux 12 web1 ttyS0\r\n\r\nweb1 login: ";

    fn read(awaited: Awaited, chunks: &[&[u8]]) -> (Option<Verdict>, String) {
        let mut console = Console::new(awaited);
        chunks.iter().for_each(|chunk| console.read(chunk));
        (console.verdict().cloned(), console.into_text())
    }

    #[test]
    fn a_start_is_readable_and_its_prompt_is_found() {
        let (verdict, text) = read(Awaited::Login, &[BOOT.as_bytes()]);
        assert_eq!(verdict, Some(Verdict::Up));
        insta::assert_snapshot!(text, @r"
        SeaBIOS (version 1.16.3)
        Booting from Hard Disk...
        GRUB loading...
        Welcome to GRUB!

        [  OK  ] Reached target Getty…

        Debian GNU/Linux 12 web1 ttyS0

        web1 login:
        ");
    }

    #[test]
    fn a_boot_loader_that_moves_the_cursor_about_is_readable() {
        let grub = b"error: you need to load the \x1b[07;28H\x1b[07;29Hkernel first.\x1b[01;01H\x1b[2J\x1b[02;24HGNU GRUB\r\n\n\ngrub> ";
        let (verdict, text) = read(Awaited::Login, &[grub]);
        assert_eq!(text, "error: you need to load the kernel first.\nGNU GRUB\n\n\ngrub>\n");
        assert!(matches!(verdict, Some(Verdict::Failed(_))));
    }

    #[test]
    fn wherever_it_is_cut_it_is_the_same() {
        let whole = read(Awaited::Login, &[BOOT.as_bytes()]);
        for at in 0..BOOT.len() {
            let (a, b) = BOOT.as_bytes().split_at(at);
            assert_eq!(read(Awaited::Login, &[a, b]), whole, "{at}");
        }
        let bytes: Vec<&[u8]> = BOOT.as_bytes().chunks(1).collect();
        assert_eq!(read(Awaited::Login, &bytes), whole);
    }

    #[test]
    fn only_a_prompt_is_one() {
        let found = |text: &str| read(Awaited::Login, &[text.as_bytes()]).0.is_some();
        for prompt in [
            "web1 login:",
            "login: ",
            "x\r\nweb1 login: ",
            "web1 login: [ 12.3] random: ready",
            "-----\rweb1 login:",
        ] {
            assert!(found(prompt), "{prompt:?}");
        }
        for other in
            ["", "login", "user x failed login:", "[ 1.0] sshd login:", "web1 prelogin:", "web1 login\n:"]
        {
            assert!(!found(other), "{other:?}");
        }
    }

    #[test]
    fn a_probe_is_a_whole_line_and_only_looked_at_where_it_is_asked_for() {
        let probe = |text: &str| read(Awaited::Probe, &[text.as_bytes()]).0;
        assert_eq!(probe("web1 login: \r\nblxrep-probe: ok"), None);
        assert_eq!(probe("web1 login: \r\nblxrep-probe: ok\r\n"), Some(Verdict::Up));
        let failed = probe("blxrep-probe: no database\r\nblxrep-probe: ok\r\n");
        assert_eq!(failed, Some(Verdict::Failed("the probe says: no database".into())));
        assert_eq!(read(Awaited::Login, &[b"blxrep-probe: no\r\n"]).0, None);
    }

    #[test]
    fn what_will_not_come_up_is_told_before_the_time_is_over() {
        for (phrase, why) in HOPELESS {
            for awaited in [Awaited::Login, Awaited::Probe] {
                let (verdict, _) = read(awaited, &[b"[ 1.0] ", phrase.as_bytes(), b": x\r\nweb1 login:"]);
                assert_eq!(verdict, Some(Verdict::Failed(why.into())));
            }
        }
    }

    #[test]
    fn whatever_a_guest_writes_is_clean_and_bounded() {
        let mut console = Console::new(Awaited::Login);
        let noise: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
        console.read(b"\x1b]0;");
        console.read(&noise);
        console.read(&b"x".repeat(2 << 20));
        console.read(&b"\n".repeat(1 << 20));
        console.read("\u{9b}2Jend".as_bytes());
        let text = console.into_text();
        assert!(text.len() <= BOOT_CONSOLE_MAX_BYTES && text.ends_with("2Jend\n"));
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    }
}
