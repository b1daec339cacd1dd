# The cable is pulled during the full copy and during syncs: nothing is missed, and nothing begins anew.
{
  imports = [ ./common/pair.nix ];

  # So that the full copy can be met.
  nodes.agent.services.blxrep.agent.settings.read-rate-mib = 10;

  testScript = builtins.readFile ./common/script.py + ''
    start_all()
    enroll()
    start("/dev/disk/by-id/virtio-data")


    def wait_for_status(machine, word):
        machine.wait_until_succeeds(f"(blxctl status || [ $? = 6 ]) >/tmp/status && grep -q {word} /tmp/status")


    def cut():
        agent.block()
        for machine in [dispatcher, agent]:
            wait_for_status(machine, "detached")
        agent.unblock()


    wait_for_status(dispatcher, "copying")
    cut()
    more_checkpoints(2)
    compare_newest(1)
    for _ in range(2):
        cut()
        more_checkpoints(2)
        compare_newest(1)
    assert agent_journal().count("is tracked") == 1, "one tracker from the start on"
  '';
}
