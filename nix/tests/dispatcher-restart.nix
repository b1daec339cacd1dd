# The dispatcher is restarted, killed, and loses its power while the agent's disk is written to.
{
  imports = [ ./common/pair.nix ];

  testScript = builtins.readFile ./common/script.py + ''
    start_all()
    enroll()
    start("/dev/disk/by-id/virtio-data")
    more_checkpoints(2)
    for what in ["restart", "kill -s KILL", "power"]:
        # The newest may not be acknowledged yet.
        had = [row["checkpoint"] for row in checkpoints()][:-1]
        if what == "power":
            dispatcher.crash()
            dispatcher.start()
        else:
            dispatcher.succeed(f"systemctl {what} blxrep-dispatcher")
        dispatcher.wait_until_succeeds("systemctl is-active -q blxrep-dispatcher")
        have = [row["checkpoint"] for row in checkpoints()]
        assert have[: len(had)] == had, (had, have)
        more_checkpoints(2)
        compare_newest(2)
    assert agent_journal().count("is tracked") == 1, "one tracker from the start on"
  '';
}
