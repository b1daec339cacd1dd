//! Hooks that fail, hang, shout and breed.

use super::*;

/// Written by another process: otherwise a child that a test beside this one is just starting could hold the
/// file open for writing, and it could not be executed ("text file busy").
pub(crate) fn write_program(path: &Path, text: &str) {
    let status = Command::new("sh").args(["-c", "printf %s \"$1\" > \"$0\""]).arg(path).arg(text).status();
    assert!(status.unwrap().success());
}

fn hook(dir: &Path, name: &str, body: &str, mode: u32) {
    let path = dir.join(name);
    write_program(&path, &format!("#!/bin/sh\n{body}\n"));
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

fn run(dir: &Path, each: Duration) -> HookReport {
    let env = HookEnv { agent: "a".into(), device_path: "/dev/x".into(), checkpoint: "c".into() };
    run_hooks(Some(dir), Stage::Frozen, &env, HookLimits { each, until: None })
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn hooks_run_in_the_order_of_their_names_with_argument_and_environment() {
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "20-b", "echo $1 $BLXREP_AGENT $BLXREP_DEVICE $BLXREP_CHECKPOINT; echo two >&2", 0o755);
    hook(dir.path(), "10-a", "cat; exit 4", 0o700);
    hook(dir.path(), "30-not-executable", "exit 1", 0o644);
    fs::create_dir(dir.path().join("40-directory")).unwrap();
    let report = run(dir.path(), LONG);
    assert_eq!(report.ran, 2);
    assert_eq!(report.failed, ["hook 10-a (frozen): failed with exit status 4"]);
    assert_eq!(report.output, [("20-b".to_owned(), "frozen a /dev/x c\ntwo".to_owned())]);
}

#[test]
fn no_directory_means_no_hooks() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(&dir.path().join("none"), LONG), HookReport::default());
}

#[test]
fn what_others_can_change_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-world", "true", 0o757);
    hook(dir.path(), "2-group", "true", 0o775);
    hook(dir.path(), "3-owner", "true", 0o755);
    std::os::unix::fs::chown(dir.path().join("3-owner"), Some(12345), None).expect("this test needs root");
    let report = run(dir.path(), LONG);
    assert_eq!((report.ran, report.failed.len()), (0, 3), "{report:?}");
    assert!(report.failed.iter().all(|f| f.contains("refused")), "{report:?}");

    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-fine", "true", 0o755);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(run(dir.path(), LONG).ran, 0, "the directory itself is open to others");
    let linked = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path().join("1-fine"), linked.path().join("1-link")).unwrap();
    assert_eq!(run(linked.path(), LONG).ran, 0, "the link leads into it");
}

#[test]
fn a_hook_that_hangs_is_killed_with_all_it_has_started() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    hook(
        dir.path(),
        "1-hangs",
        &format!("echo begun; sleep 1000 & echo $! > {}; wait", pid.display()),
        0o755,
    );
    let begin = Instant::now();
    let report = run(dir.path(), Duration::from_millis(700));
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(report.failed[0].contains("killed, it did not end"), "{report:?}");
    assert_eq!(report.output[0].1, "begun");
    let pid = fs::read_to_string(pid).unwrap();
    let state = || fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    let until = Instant::now() + LONG;
    while !(state().is_empty() || state().contains(") Z ")) {
        assert!(Instant::now() < until, "the hook's child lives on: {}", state());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_child_that_keeps_the_output_open_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-daemon", "echo here; setsid sleep 7 &", 0o755);
    let begin = Instant::now();
    let report = run(dir.path(), LONG);
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    assert_eq!((report.failed.len(), report.output[0].1.as_str()), (0, "here"));
}

#[test]
fn endless_output_neither_fills_memory_nor_keeps_a_hook_alive() {
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-shouts", "exec yes", 0o755);
    let begin = Instant::now();
    let report = run(dir.path(), Duration::from_millis(500));
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(report.failed.len(), 1);
    assert!(report.output[0].1.len() <= OUTPUT_KEPT_BYTES);
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-long", "seq 1 20000", 0o755);
    let report = run(dir.path(), LONG);
    assert!(report.failed.is_empty() && report.output[0].1.ends_with("19999\n20000"), "{report:?}");
}

#[test]
fn no_hook_goes_on_behind_the_end_of_the_freeze() {
    let dir = tempfile::tempdir().unwrap();
    hook(dir.path(), "1-slow", "sleep 1000", 0o755);
    hook(dir.path(), "2-late", "true", 0o755);
    let env = HookEnv { agent: "a".into(), device_path: "/dev/x".into(), checkpoint: "c".into() };
    let limits = HookLimits { each: LONG, until: Some(Instant::now() + Duration::from_millis(300)) };
    let report = run_hooks(Some(dir.path()), Stage::Frozen, &env, limits);
    assert_eq!((report.ran, report.failed.len()), (1, 2), "{report:?}");
    assert!(report.failed[1].contains("no time was left"));
}

#[test]
fn what_is_no_program_is_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    write_program(&dir.path().join("x"), "neither a script nor a program");

    fs::set_permissions(dir.path().join("x"), fs::Permissions::from_mode(0o755)).unwrap();
    let report = run(dir.path(), LONG);
    assert!(report.failed[0].contains("cannot be started"), "{report:?}");
}
